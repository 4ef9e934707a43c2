"""What a run will take, from settings alone: memory in each stage, and the time of a network call.

Weights are counted from the geometry of every model (`models.geometry`), activations by calls of two rows on the meta
device (`models.metering`), as every further row takes as much. Nothing is loaded.

These are lower bounds: what kernels take for a while, what an allocator loses between blocks, and what CUDA keeps for
itself (about half a GiB) come on top, and so does what a judge and a reward model take besides their weights.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import nn

import models
from pipeline.compiling import repeated_blocks
from pipeline.judging import EnsembleJudge, ServerModel, told
from pipeline.rl.settings import LoraSettings
from pipeline.runner import process_state
from pipeline.settings import UserError

if TYPE_CHECKING:
    from models.geometry import Geometry
    from models.metering import Cost

GIB = 2**30

SHARE = 0.45
"""Of a device's matmul rate, what a network's call is taken to reach."""

_ROWS = 2
_SERVED_SHARE = 0.9
"""Of a device, what vLLM takes unless it is told otherwise."""

_ROOM = "--gpu-memory-utilization"

_TOWER = re.compile(r"(^|\.)(vision_model|vision_tower|visual|vision)\.")
"""What reads pictures in a reward model."""


@dataclass(frozen=True)
class Need:
    """Of one stage, in bytes: `held` all the time by what for, and the `phases`, one after another.

    So much waits in main memory meanwhile (`waiting`); `notes` say what is not in it.
    """

    stage: str
    held: dict[str, int]
    phases: dict[str, int]
    waiting: int = 0
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """The most at once."""
        return sum(self.held.values()) + max(self.phases.values(), default=0)


@dataclass
class _Kept:
    """Bytes of judge and reward model, of what is `trained` of that, and of the `terms` of the reward that are other
    models; and what is not known of them."""

    judge: int = 0
    reward: int = 0
    trained: int = 0
    terms: int = 0
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def noting(self, part: str) -> Iterator[None]:
        try:
            yield
        except models.geometry.Unknown as error:
            self.notes.append(f"{part}: {error}")


@dataclass(frozen=True)
class _Networks:
    """The networks of a generator on the meta device, and how it is asked by default."""

    looks: "Geometry"
    codec: nn.Module
    encoders: tuple[nn.Module, ...]
    targets: tuple[str, ...]
    scale: float
    text_tokens: Callable[[int | None], int]
    size: tuple[int, int]
    sized: Callable[[int | tuple[int, int]], tuple[int, int]]

    @property
    def native(self) -> bool:
        return self.looks.pipeline is None


@functools.cache
def _networks(checkpoint: str, revision: str | None) -> _Networks:
    """Raises Unknown where nothing tells what it looks like, and UserError where it is of no family that is known."""
    looks, families = models.geometry.geometry(checkpoint, revision), models.adapters.FAMILIES
    if looks.pipeline not in (None, *families):
        known = ", ".join(families)
        raise UserError(f"generator.checkpoint: {checkpoint} is a {looks.pipeline}; supported are {known}")
    network, codec = looks.network.build(), looks.codec.build()
    family: Any = getattr(models.adapters, families[looks.pipeline]) if looks.pipeline else network
    cell = models.geometry.cell(codec)
    side = network.config.get("size") or network.config.get("sample_size") or 1024 // cell

    def sized(resolution: int | tuple[int, int]) -> tuple[int, int]:
        if looks.pipeline:
            return family.size(resolution, cell, network)
        return models.generator.sides(resolution, cell * network.config.patch)

    return _Networks(
        looks=looks,
        codec=codec,
        encoders=tuple(part.build() for part in looks.encoders),
        targets=family.targets(network) if looks.pipeline else network.lora_targets,
        scale=getattr(family, "scale", 1.0),
        text_tokens=family.text_tokens if looks.pipeline else lambda _: looks.text_tokens,
        size=(side * cell, side * cell),
        sized=sized,
    )


@functools.cache
def _network(checkpoint: str, revision: str | None, dtype: torch.dtype) -> nn.Module:
    return models.geometry.geometry(checkpoint, revision).network.build().to(dtype)


@functools.cache
def _learner(
    checkpoint: str,
    revision: str | None,
    dtype: torch.dtype,
    adapter: tuple[int, tuple[str, ...]] | None,
    checkpointed: bool,
) -> nn.Module:
    """The network with what is trained of it: an adapter of a rank on targets, or all."""
    from diffusers.loaders import PeftAdapterMixin  # diffusers takes seconds to import

    network = models.geometry.geometry(checkpoint, revision).network.build()
    if adapter is None:
        network.requires_grad_(True)
    else:
        if not isinstance(network, PeftAdapterMixin):  # diffusers' PixArt and DiT
            network.__class__ = type(type(network).__name__, (type(network), PeftAdapterMixin), {})
        with torch.device("meta"), models.metering.shortened(network):
            targets = models.lora.known_targets(network, adapter[1])  # some name blocks that are left out
            models.lora.attach(network, targets, adapter[0], adapter[0], seed=0)
    if checkpointed:
        network.enable_gradient_checkpointing()
    return network.to(dtype)


@functools.cache
def _size(module: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Of networks that are kept here, and asked for again and again."""
    return models.metering.size(module, dtype)


@functools.cache
def _cost(network: nn.Module, size: tuple[int, int], tokens: int, learning: bool) -> "Cost":
    """Of `_ROWS` rows."""
    call = models.metering.learned if learning else models.metering.painted
    return call(network, models.geometry.asked(network, _ROWS, size, tokens))


@functools.cache
def _decoding(codec: nn.Module, height: int, width: int, dtype: torch.dtype) -> "Cost":
    """Of one picture."""
    codec = codec.to(dtype)
    given = {"z": models.geometry.latent(codec, 1, height, width, dtype)}
    return models.metering.painted(codec, given, lambda z: codec.decode(z))


@dataclass(frozen=True)
class Painter:
    """The generator of a run's settings, as it is asked in them."""

    config: Any

    @property
    def _settings(self) -> Any:
        return self.config.generator

    @property
    def _looks(self) -> _Networks:
        return _networks(self._settings.checkpoint, self._settings.revision)

    @property
    def dtype(self) -> str:
        """In which the network computes where it learns."""
        trained = self.config.finetune.dtype
        return trained if trained != "float32" else self._settings.dtype

    @property
    def size(self) -> tuple[int, int]:
        """Of a picture: height and width in pixels. Raises UserError where the network paints none such."""
        if self._settings.resolution is None:
            return self._looks.size
        with told("generator"):
            return self._looks.sized(self._settings.resolution)

    @property
    def guided(self) -> bool:
        """Whether every picture is two rows of a call."""
        given = self._settings.guidance
        scale = self._looks.scale if given is None else getattr(given, "scale", given)
        return scale != 1

    @property
    def network(self) -> nn.Module:
        """In the dtype of its weights."""
        return _network(self._settings.checkpoint, self._settings.revision, getattr(torch, self._settings.dtype))

    @property
    def weights(self) -> int:
        """Bytes of the network."""
        return _size(self.network)

    @property
    def gathered(self) -> int:
        """Bytes of the network that are whole at a time where it is sharded: a block and the next, and what is in no
        block."""
        blocks = sorted(map(models.metering.size, repeated_blocks(self.network, 1)))
        return self.weights - sum(blocks) + sum(blocks[-2:])

    @property
    def encoders(self) -> int:
        return sum(_size(one, getattr(torch, self._settings.text_dtype)) for one in self._looks.encoders)

    @property
    def codec(self) -> int:
        return _size(self._looks.codec, getattr(torch, self._settings.codec_dtype))

    @property
    def offloads(self) -> bool:
        """Whether text encoders and codec are on the device only while they are used."""
        return self._settings.offload and not self._looks.native

    def decoding(self, pictures: int) -> int:
        """Bytes besides the codec's own: pictures are decoded one by one, and so many kept as numbers."""
        height, width = self.size
        dtype = getattr(torch, self._settings.codec_dtype)
        one = _decoding(self._looks.codec, height, width, dtype).bytes
        each = 3 * height * width * (dtype.itemsize + 2 * torch.float32.itemsize)
        return one + pictures * each

    def painting(self, pictures: int) -> "Cost":
        """A call of the network for so many pictures, without a gradient."""
        return self._asked(self.network, pictures, learning=False)

    def learning(self, pictures: int) -> "Cost":
        """A call and its backward pass, as `finetune` makes them."""
        return self._asked(self._learner, pictures, learning=True)

    @property
    def trained(self) -> int:
        """How many numbers are trained: a B A of each target's weight, or all."""
        if self._adapter is None:
            return sum(weight.numel() for weight in self.network.parameters())
        rank, targets = self._adapter
        ends = tuple(f".{target}" for target in targets)
        shapes = [layer.weight.shape for name, layer in self.network.named_modules() if f".{name}".endswith(ends)]
        return sum(rank * (shape[0] + math.prod(shape[1:])) for shape in shapes)

    @property
    def _adapter(self) -> tuple[int, tuple[str, ...]] | None:
        settings = self.config.finetune.lora
        return settings and (settings.rank, tuple(settings.targets or self._looks.targets))

    @property
    def _learner(self) -> nn.Module:
        settings, adapter = self.config.finetune, self._adapter
        place = self._settings.checkpoint, self._settings.revision, getattr(torch, self.dtype)
        return _learner(*place, adapter, settings.gradient_checkpointing)

    def _asked(self, network: nn.Module, pictures: int, learning: bool) -> "Cost":
        per_cell, (height, width) = models.geometry.cell(self._looks.codec), self.size
        size = height // per_cell, width // per_cell
        tokens = self._looks.text_tokens(self._settings.max_tokens)
        rows = pictures * (2 if self.guided else 1)
        return _cost(network, size, tokens, learning).times(rows / _ROWS)


def needs(config: Any, processes: int, memory: int) -> list[Need]:
    """Of each stage that a run of `config` has a use for, in order; bytes a process.

    Args:
        memory: bytes of the device, of which a judge that is served on it takes a share.

    Raises:
        Unknown: nothing tells what the generator looks like.
        UserError: it is of no family that is known.
    """
    painter = Painter(config)
    kept = _kept(config, memory)
    sampled = [] if config.prefer.table else [_painting("sample", painter, config.sample.batch)]
    judged = [] if config.prefer.table else [Need("judge", {"judge": kept.judge}, {})]
    later = {"judge": kept.judge, "reward": kept.reward}
    return [
        *sampled,
        *judged,
        Need("reward", {"reward": kept.reward, "trained": kept.trained}, {}, notes=tuple(kept.notes)),
        _finetune(config, painter, kept, processes),
        _painting("evaluate", painter, config.evaluate.batch, later, copies=2),
    ]


def need_of(config: Any, stage: str, processes: int, memory: int) -> Need:
    """That of one of the stages, or of the verb `invert`; see `needs`."""
    if stage == "invert":
        return _painting("invert", Painter(config), 1, copies=2)
    return next(need for need in needs(config, processes, memory) if need.stage == stage)


def _painting(
    stage: str, painter: Painter, batch: int, later: Mapping[str, int] | None = None, copies: int = 1
) -> Need:
    """A stage that paints batch by batch, with so many copies of the network, of which all but one wait in main memory
    where text encoders do; what is held `later` comes after prompts were encoded."""
    later = later or {}
    waiting = copies - 1 if painter.offloads else 0
    phases = {"painting": painter.painting(batch).bytes, "decoding": painter.decoding(batch)}
    held = {"network": (copies - waiting) * painter.weights, **later}
    return _need(stage, painter, held, phases, sum(later.values()), waiting * painter.weights)


def _finetune(config: Any, painter: Painter, kept: _Kept, processes: int) -> Need:
    """The weights, or where they are sharded a share of them and what is gathered; those of the twin that rolls out;
    and what is trained: in float32, with a gradient, two moments of AdamW and an average."""
    settings = config.finetune
    asks = "judge" in settings.rewarded or settings.refresh or (settings.watch and settings.watch.judge)
    pictures = -(-settings.helpings * settings.trained.group_size // processes)
    rows, each = min(settings.batch, pictures), settings.algorithm.rows
    learned = each * max(1, min(settings.batch // each, pictures))
    whole = settings.lora is None
    held = {
        "network": 4 * painter.trained if whole else painter.weights,
        "twin": painter.weights if settings.has_twin(config.generator.dtype) else 0,
        "trained": (16 if whole else 20) * painter.trained,
        "judge": kept.judge if asks else 0,
        "reward": (kept.reward if "model" in settings.rewarded else 0) + kept.terms,
    }
    if settings.shards(processes):
        held |= {"network": -(-painter.weights // processes), "gathered": painter.gathered}
    if whole and settings.keep_base:
        held["base"] = painter.weights
    phases = {
        "painting": painter.painting(rows).bytes,
        "decoding": painter.decoding(rows),
        "learning": painter.learning(learned).bytes,
    }
    need = _need("finetune", painter, held, phases)
    if not settings.algorithm.follows_reward:
        return need
    return replace(need, notes=("finetune: the gradient through reward, codec and all steps but one",))


def _need(
    stage: str, painter: Painter, held: dict[str, int], phases: dict[str, int], later: int = 0, waiting: int = 0
) -> Need:
    """With text encoders and codec, which are held all the time or only while they are used; so much of what is held
    comes after prompts were encoded, and so much else waits in main memory."""
    if painter.offloads:
        encoding = max(0, painter.encoders - later)
        phases = {**phases, "encoding": encoding, "decoding": painter.codec + phases["decoding"]}
        waiting += painter.encoders + painter.codec
    else:
        held = {**held, "encoders": painter.encoders, "codec": painter.codec}
    return Need(stage, {name: size for name, size in held.items() if size}, phases, waiting)


def _kept(config: Any, memory: int) -> _Kept:
    found = _Kept()
    with found.noting("judge"):
        found.judge = _judge(config.judge, memory)
    with found.noting("reward"):
        backbone = config.reward.backbone
        found.reward = _weights(backbone.checkpoint, getattr(backbone, "dtype", "float32"))
        found.trained = _reward_trained(backbone.checkpoint, config.reward.train)
    for term in config.finetune.mixture.terms:
        if term.type == "checkpoint":
            with found.noting("reward"):
                found.terms += _weights(term.path, "float32")
    return found


def _reward_trained(checkpoint: str, how: Any) -> int:
    """Bytes of the gradients and of AdamW's two moments of what `how` trains of a reward model, in float32."""
    whole, behind, sides = _numbers(checkpoint)
    count = {"full": whole, "lora": getattr(how, "rank", 0) * sides, "frozen": (1 - getattr(how, "share", 0)) * behind}
    return round(12 * count[how.type])


@functools.cache
def _numbers(checkpoint: str) -> tuple[int, int, int]:
    """Of a reward model's weights: of all; of those behind what reads pictures; of inputs and outputs of its linear
    layers, which is how many an adapter of rank 1 has."""
    networks = [part.build() for part in models.geometry.geometry(checkpoint).parts.values()]
    named = [each for network in networks for each in network.named_parameters()]
    layers = [one for network in networks for one in network.modules() if isinstance(one, nn.Linear)]
    return (
        sum(weight.numel() for _, weight in named),
        sum(weight.numel() for name, weight in named if not _TOWER.search(name)),
        sum(layer.in_features + layer.out_features for layer in layers),
    )


def _judge(settings: Any, memory: int) -> int:
    """Bytes that a judge takes of this device."""
    if isinstance(settings, EnsembleJudge):
        return sum(_judge(member, memory) for member in settings.members)
    model = getattr(settings, "model", settings)
    if isinstance(model, ServerModel):
        return round(_share(model.serve.arguments) * memory) if model.serve else 0
    if model.type == "vllm":
        return round(model.engine.get("gpu_memory_utilization", _SERVED_SHARE) * memory)
    return _weights(model.checkpoint)


def _share(arguments: Sequence[str]) -> float:
    told = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{_ROOM}=")]
    return float(told[-1]) if told else _SERVED_SHARE


@functools.cache
def _weights(checkpoint: str, dtype: str | None = None) -> int:
    """Bytes of all networks at a checkpoint, in `dtype` or as they are kept."""
    parts = models.geometry.geometry(checkpoint).parts.values()
    return sum(models.metering.size(part.build(), getattr(torch, dtype or part.dtype or "float32")) for part in parts)


def device_memory(processes: int = 1) -> int:
    """Bytes of the device that this process works on; processes on a CPU share its memory."""
    device = process_state().device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // processes


@dataclass(frozen=True)
class Remedy:
    """Settings that bring a stage under the memory of a device, or as near as they can."""

    settings: tuple[str, ...]
    need: Need


def remedy(config: Any, stage: str, memory: int, processes: int) -> Remedy:
    """One after another those that make `stage` smaller, the ones that cost least first, until it fits."""
    found, best, chosen = need_of(config, stage, processes, memory), config, {}
    for name, value, changed in _smaller(config, stage, processes, memory):
        if found.total <= memory:
            break
        tried = changed(best)
        if _loads(tried) and (need := need_of(tried, stage, processes, memory)).total < found.total:
            best, found = tried, need
            chosen[name] = value
    if "finetune.shard" in chosen and config.finetune.twin is None:
        chosen.pop("finetune.twin", None)  # beside shards there is none anyway
    return Remedy(tuple(f"{name}={value}" for name, value in chosen.items()), found)


def _loads(config: Any) -> bool:
    """Whether the settings suit one another."""
    try:
        type(config).model_validate(config.model_dump(warnings=False))
    except ValidationError:
        return False
    return True


def _smaller(config: Any, stage: str, processes: int, memory: int) -> Iterator[tuple[str, str, Any]]:
    """Settings to try: name, value, and what makes of a config one with it.

    A network that takes most of a device is sharded before batches become small, another one only after that.
    """
    section = getattr(config, stage)

    def to(part: str, **values: Any) -> Any:
        return lambda config: config.model_copy(update={part: getattr(config, part).model_copy(update=values)})

    if stage not in ("sample", "finetune", "evaluate", "invert"):
        return
    ours = config.generator.ours
    if not ours:
        yield "generator.offload", "true", to("generator", offload=True)
    shards = stage == "finetune" and processes > 1
    sharded = "finetune.shard", "true", to("finetune", shard=True)
    if stage == "finetune":
        yield "finetune.gradient_checkpointing", "true", to("finetune", gradient_checkpointing=True)
        yield "finetune.twin", "false", to("finetune", twin=False)
    if shards and 2 * Painter(config).weights > memory:
        yield sharded
    batch = getattr(section, "batch", 1) // 2
    while batch:
        yield f"{stage}.batch", str(batch), to(stage, batch=batch)
        batch //= 2
    if not ours:
        for name in ("text_dtype", "codec_dtype", "dtype"):
            yield f"generator.{name}", "bfloat16", to("generator", **{name: "bfloat16"})
    if stage == "finetune":
        yield "finetune.dtype", "bfloat16", to("finetune", dtype="bfloat16")
        if section.lora is None:
            yield "finetune.keep_base", "false", to("finetune", keep_base=False)
            yield "finetune.lora", "{}", to("finetune", lora=LoraSettings())
        if shards:
            yield sharded
        rank = section.lora.rank // 2 if section.lora else 0
        while rank:
            smaller = section.lora.model_copy(update={"rank": rank})
            yield "finetune.lora.rank", str(rank), to("finetune", lora=smaller)
            rank //= 2
    yield "generator.guidance", "1", to("generator", guidance=1.0)


def check(config: Any, stage: str, processes: int = 1) -> None:
    """Raises UserError where `stage` needs more than this device has, as far as can be told."""
    memory = device_memory(processes)
    try:
        need = need_of(config, stage, processes, memory)
    except models.geometry.Unknown:
        return
    if need.total > memory:
        raise UserError(refusal(config, need, memory, processes))


def fits(stage: str) -> Callable[[Any], None]:
    """What raises UserError, before any work, where the network paints no such sizes, or `stage` takes more memory than
    this machine has."""

    def of(config: Any) -> None:
        if not config.generator.ours or config.generator.resolution is not None:
            check(config, stage, process_state().num_processes)

    return of


def refusal(config: Any, need: Need, memory: int, processes: int) -> str:
    """One line on a stage that does not fit."""
    line = f"memory: {need.stage} needs {_gib(need.total)} GiB a process at least, and there are {_gib(memory)}"
    best = remedy(config, need.stage, memory, processes)
    if best.need.total <= memory:
        return f"{line}; it takes {_gib(best.need.total)} with {' '.join(best.settings)}"
    judge = need.held.get("judge", 0)
    if judge and best.need.total - judge <= memory:
        return f"{line}; give the judge a device of its own (judge.model: a server at urls) {' '.join(best.settings)}"
    if not best.settings:
        return f"{line}; take a larger device or a smaller model"
    return f"{line}; even with {' '.join(best.settings)} it takes {_gib(best.need.total)}: take a larger device"


def print_needs(found: Sequence[Need], memory: int, console: Console) -> None:
    """Show a line for each stage: what it holds, the most of its phases, how much of the device that is, and what waits
    in main memory."""
    table = Table("stage", "held, GiB a process", "at once", "total", "of device", "waiting")
    for column in table.columns[2:]:
        column.justify = "right"
    for need in found:
        held = ", ".join(f"{name} {_gib(size)}" for name, size in need.held.items())
        phase = max(need.phases, key=need.phases.__getitem__, default=None)
        most = f"{phase} {_gib(need.phases[phase])}" if phase else ""
        share, waiting = f"{100 * need.total / memory:.0f} %", _gib(need.waiting) if need.waiting else ""
        table.add_row(need.stage, held, most, _gib(need.total), share, waiting)
    console.print(table)
    for note in dict.fromkeys(note for need in found for note in need.notes):
        console.print(f"not counted: {note}", markup=False, highlight=False, soft_wrap=True)


def call_seconds(config: Any, speed: float, learning: bool = False) -> float | None:
    """Of one network call for one picture, or of one with its backward pass, on a device of `speed` matmul operations a
    second; None where nothing tells what the generator looks like."""
    painter = Painter(config)
    try:
        cost = painter.learning(1) if learning else painter.painting(1)
    except models.geometry.Unknown:
        return None
    return cost.flops / (SHARE * speed)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= GIB // 10 else f"{size / GIB:.2f}"
