"""What paints: generators, their samplers and adapters."""

from models.generator import Conditioning, Generator, NativeGenerator, load_generator, sample, sample_key

__all__ = ["Conditioning", "Generator", "NativeGenerator", "load_generator", "sample", "sample_key"]
