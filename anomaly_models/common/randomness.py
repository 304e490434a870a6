"""Random numbers that a run can repeat: every draw comes from a generator that is handed down."""

import torch


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """The generator itself, or one on `device` that is a function of it: numbers are drawn where they are used."""
    if generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)
