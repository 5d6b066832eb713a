"""Prints the memory that there is, whether some is in use, and why a run that needs too much of it is refused."""

from configs import smoke
from wavelet_jax.errors import UserError
from wavelet_jax.hardware import memory
from wavelet_jax.training import sizes

print(*memory.available())
print(memory.in_use() > 2**28)
config = smoke.get_config("nope")
sizes.check(config)
config.model.d_ff = 2**22
try:
    sizes.check(config)
except UserError as error:
    print(error)
