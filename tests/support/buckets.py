"""A bucket without a cloud: an emulator of Google's storage in a thread, with the conditional writes that it lacks."""

import contextlib
import os
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import HTTPServer
from unittest import mock

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

from support.project import free_port

BUCKET = "bucket"


@contextlib.contextmanager
def emulator() -> Iterator[dict[str, str]]:
    """Serves an empty bucket, to this process and to those with the variables that it gives."""
    address = f"127.0.0.1:{free_port()}"
    variables = {
        **dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), f"http://{address}"),
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs asks a service for a minute
    }
    host, _, port = address.partition(":")
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            if handler in (objects.insert, objects.delete, objects.get, objects.download):
                handlers[method] = _with_generations(handler)
    serving = server.create_server(host, int(port), in_memory=True, default_bucket=BUCKET)
    hung_up = mock.patch.object(HTTPServer, "handle_error")  # a client that does not read an answer to its end
    with mock.patch.dict(os.environ, variables), hung_up, serving:
        yield variables


def _with_generations(handler: Callable) -> Callable:
    """Answers 412 where ifGenerationMatch is not the object's generation, and says which it is: TensorStore asks.

    Requests are served one after another.
    """

    def handle(request, response, storage):
        expected = request.query.get("ifGenerationMatch")
        key = request.params.get("object_id") or request.query.get("name", [None])[0]
        found = storage.objects.get(request.params["bucket_name"], {}).get(key, {}).get("generation", "0")
        if request.method == "GET":
            response["x-goog-generation"] = found
        elif expected and found != expected[0]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            return
        handler(request, response, storage)

    return handle
