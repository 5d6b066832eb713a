from typing import Any

class TupleParser:
    def parse(self, argument: Any) -> tuple: ...
