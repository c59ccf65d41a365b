"""A second device for torch where there is no accelerator: memory and arithmetic are the processor's, the rest is not.

Tensors of it cannot be mixed with those of the processor, copies between the two are explicit, backward passes run in a
thread of the device, and random numbers come from generators of the device. What works here does not assume that there
is one device. See `second_device.cpp`; the first use compiles it, with the C++ compiler of the system, in ten to twenty
seconds.
"""

import types
from functools import cache
from pathlib import Path

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from torch.utils import cpp_extension

NAME = "second"


@cache
def second_device() -> torch.device:
    """Make the device known to torch.

    Returns:
        The device, for `.to(device)`.
    """
    source = Path(__file__).with_suffix(".cpp")
    # Of the first -O levels: the arithmetic is torch's own.
    # Not a module of Python: the headers for that take three times as long as all others.
    cpp_extension.load(
        name="second_device",
        sources=[str(source)],
        extra_cflags=["-O1"],
        is_python_module=False,
    )
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "_is_in_bad_fork": False,
    }
    for name, answer in answers.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)


class SecondAccelerator(CPUAccelerator):
    """Lets a Trainer train on the device: `Trainer(accelerator=SecondAccelerator())`."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing is to be done; Lightning's own refuses devices that are not the processor."""

    @staticmethod
    def get_parallel_devices(devices: object) -> list[torch.device]:
        return [second_device()]
