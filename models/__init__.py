"""What paints: generators, their samplers and adapters.

Names are imported when they are first used: settings and finished runs do not wait for torch and transformers.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["adapters", "geometry", "lora", "metering"],
    submod_attrs={
        "generator": ["Conditioning", "Generator", "NativeGenerator", "sample"],
        "guidance": ["Guidance"],
        "inversion": ["Inversion", "noise_of"],
        "keys": ["sample_key"],
        "loading": ["load_generator", "tuned"],
    },
)
