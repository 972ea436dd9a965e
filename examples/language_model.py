"""``python -m examples.language_model``: a small GPT, trained on Python's own reference, measured and made smaller.

Writes ``reports/language_model/``. Every choice is made on the search split; the test split is for reported numbers.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import math
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import utilized_rank as ur
from utilized_rank.api.compressing import Method
from utilized_rank.base import runtime
from utilized_rank.base.files import read_json, read_table, read_tensors, write_json, write_network, write_table
from utilized_rank.networks import cost
from utilized_rank.networks.evaluation import logits_of
from utilized_rank.report.figures import style

from . import language_model_figures as figures

ROOT = Path(__file__).parents[1]
BYTES = 256
"""The vocabulary."""
PARAGRAPH = 60
"""Characters from which on a paragraph that two topics share is no coincidence."""
KINDS = {
    "attn.c_attn": "queries, keys, values",
    "attn.c_proj": "attention output",
    "mlp.c_fc": "MLP up",
    "mlp.c_proj": "MLP down",
    "lm_head": "head",
}
"""What the layers of GPT-2 do, by how their names end."""
VIT = {
    "attn.qkv": "queries, keys, values",
    "attn.proj": "attention output",
    "mlp.fc1": "MLP up",
    "mlp.fc2": "MLP down",
    "patch_embed.proj": "patches",
    "head": "head",
}
"""The same of timm's vision transformers."""
WHOLE = "none"
"""The method of the network that is not made smaller."""
CURVE = ["step", "train_bits", "search_bits", "seconds"]
PACKAGES = ("torch", "transformers", "numpy", "pandas")
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@dataclass(frozen=True)
class Training:
    """What the network is, and how it is trained."""

    seed: int = 0
    threads: int = 1
    search: float = 0.12
    """Part of the text that choices are made on."""
    test: float = 0.12
    """Part of the text that is reported on."""
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    """Bytes that the network sees at most."""
    dropout: float = 0.0
    """Of the embeddings, and of what attention and MLPs add."""
    steps: int = 2400
    batch: int = 12
    lr: float = 2.5e-3
    warmup: int = 100
    decay: float = 0.1
    every: int = 200
    """Steps from one point of the loss curve to the next."""


@dataclass(frozen=True)
class Settings:
    """All parameters of the example."""

    training: Training = Training()
    calibration: int = 96
    """Training windows that moments are taken over and weights are fitted to."""
    search: int = 48
    """Windows of the search split that ranks are searched on, evenly spread."""
    tolerances: tuple[float, ...] = (0.01, 0.05)
    """Tolerated increase of the perplexity, as a part of it."""
    energy: float = 0.99
    kept: tuple[float, ...] = (0.8, 0.65, 0.5, 0.35)
    """Parts of the parameters."""
    methods: tuple[Method, ...] = ("compensated", "optimal", "svd")
    loss_inputs: int = 24
    """Calibration windows that a budget's divergence is measured on."""
    draws: int = 2000
    """Of the bootstrap."""


def topics() -> dict[str, str]:
    """Python's language reference, topic by topic, as ``help()`` shows it."""
    from pydoc_data.topics import topics as found

    return dict(found)


def text_hash(documents: Mapping[str, str]) -> str:
    """SHA-256 of all documents and their names."""
    return hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()


def paragraphs(text: str) -> list[str]:
    """What blank lines divide."""
    return text.split("\n\n")


def families(documents: Mapping[str, str]) -> list[list[str]]:
    """Names of documents, together where they share a long paragraph, directly or by way of others."""
    family = {name: [name] for name in documents}
    first: dict[str, str] = {}
    for name, text in documents.items():
        for paragraph in paragraphs(text):
            other = first.setdefault(" ".join(paragraph.split()), name)
            if len(paragraph) >= PARAGRAPH and family[other] is not family[name]:
                family[other] += family[name]
                family |= dict.fromkeys(family[name], family[other])
    return list({id(its): its for its in family.values()}.values())


def split(documents: Mapping[str, str], shares: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Names of the documents of each split: families in random order, each to the first split that has room for it.

    Args:
        documents: texts by name.
        shares: parts of the text that splits hold at most, by name; what has no room is for ``train``.
        seed: of the order.
    """
    found: dict[str, list[str]] = {name: [] for name in ("train", *shares)}
    left = {name: share * sum(map(len, documents.values())) for name, share in shares.items()}
    order = families(documents)
    random.Random(seed).shuffle(order)
    for family in order:
        size = sum(len(documents[name]) for name in family)
        to = next((name for name in shares if size <= left[name]), "train")
        found[to] += family
        left[to] = left.get(to, 0) - size
    return found


def joined(texts: Iterable[str]) -> bytes:
    """One text of several; of long paragraphs that repeat, the first."""
    seen: set[str] = set()
    kept = []
    for paragraph in (paragraph for text in texts for paragraph in paragraphs(text)):
        if len(paragraph) < PARAGRAPH or paragraph not in seen:
            kept.append(paragraph)
        seen.add(paragraph)
    return "\n\n".join(kept).encode()


def encoded(text: bytes) -> Tensor:
    """The bytes as numbers: int64 (L,)."""
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))


def windows(text: bytes, context: int) -> Tensor:
    """All of ``text`` in pieces that overlap by one byte, so that each predicts ``context``: int64 (N, context + 1)."""
    return encoded(text).unfold(0, context + 1, context)


def spread(pieces: Tensor, count: int) -> Tensor:
    """``count`` of the windows, evenly spread, or all where there are fewer."""
    return pieces[torch.linspace(0, len(pieces) - 1, min(count, len(pieces))).long()]


@torch.inference_mode()
def losses(network: nn.Module, pieces: Tensor, batch: int = 64) -> np.ndarray:
    """Mean cross-entropy of each window's bytes given those before them, in nats: float64 (N,)."""
    network.eval()
    found = []
    for part in pieces.split(batch):
        logits = logits_of(network(part[:, :-1]))  # (B, L, 256)
        found.append(F.cross_entropy(logits.mT, part[:, 1:], reduction="none").double().mean(1))
    return torch.cat(found).numpy()


def perplexity(each: np.ndarray) -> float:
    """Per byte, from the mean losses of windows."""
    return math.exp(each.mean())


def bits(of: float) -> float:
    """Bits per byte that a perplexity per byte amounts to."""
    return math.log2(of)


@dataclass(frozen=True)
class NegativePerplexity:
    """A score: the higher the better."""

    pieces: Tensor

    def __call__(self, network: nn.Module) -> float:
        """Minus the perplexity of ``network``."""
        return -perplexity(losses(network, self.pieces))


@dataclass(frozen=True)
class Change:
    """A change of perplexity between two networks on the same windows, in percent, with its 95% interval."""

    percent: float
    low: float
    high: float


def paired_change(before: np.ndarray, after: np.ndarray, draws: int, seed: int) -> Change:
    """The change from ``before`` to ``after``, mean losses of the same windows (N,), by a paired bootstrap.

    Windows are drawn with replacement, ``draws`` times, and both networks are compared on each draw; the interval
    lies between the 2.5th and the 97.5th percentile.
    """
    difference = after - before
    drawn = np.random.default_rng(seed).integers(len(difference), size=(draws, len(difference)))
    low, high = np.percentile(difference[drawn].mean(1), [2.5, 97.5])
    return Change(*(100 * math.expm1(value) for value in (difference.mean(), low, high)))


def baselines(train: bytes, test: bytes) -> dict[str, float]:
    """Bits per byte of ``test`` by what knows no context, or was not trained.

    A compressor is given the test text behind the training text, and is charged for what that adds.
    """
    counts = Counter(train)
    total = len(train) + BYTES
    unigram = -sum(math.log2((counts[byte] + 1) / total) for byte in test) / len(test)
    after = {
        f"{name}, after the training text": 8 * (len(its(train + test)) - len(its(train))) / len(test)
        for name, its in COMPRESSORS.items()
    }
    return {"unigram": unigram, **{name: 8 * len(its(test)) / len(test) for name, its in COMPRESSORS.items()}, **after}


def gpt(of: Training) -> GPT2LMHeadModel:
    """An untrained network; its head has weights of its own, so that it is a layer like the others."""
    config = GPT2Config(
        vocab_size=BYTES,
        n_positions=of.context,
        n_embd=of.width,
        n_layer=of.layers,
        n_head=of.heads,
        resid_pdrop=of.dropout,
        embd_pdrop=of.dropout,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one kernel
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config)


def learning_rate(step: int, of: Training) -> float:
    """As a part of the highest: rises over ``warmup`` steps, then half a cosine down to a tenth."""
    if step < of.warmup:
        return (step + 1) / of.warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - of.warmup) / max(1, of.steps - of.warmup))


def train(network: nn.Module, text: bytes, search: Tensor, of: Training, draw: torch.Generator) -> pd.DataFrame:
    """Train ``network`` in place on random windows of ``text``; the curve: step, train_bits, search_bits, seconds."""
    every = encoded(text).unfold(0, of.context + 1, 1)  # (N, context + 1), a view
    optimizer = torch.optim.AdamW(network.parameters(), of.lr, betas=(0.9, 0.99), weight_decay=of.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, of))
    curve, recent, start = [], [], time.perf_counter()
    for step in range(1, of.steps + 1):
        network.train()
        batch = every[torch.randint(len(every), (of.batch,), generator=draw)]
        loss = F.cross_entropy(logits_of(network(batch[:, :-1])).mT, batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item() / math.log(2))
        if step % of.every == 0 or step == of.steps:
            point = {"step": step, "train_bits": float(np.mean(recent)), "search_bits": _bits(network, search)}
            curve.append({**point, "seconds": time.perf_counter() - start})
            print(", ".join(f"{name} {value:.4g}" for name, value in curve[-1].items()), flush=True)
            recent.clear()
    return pd.DataFrame(curve, columns=CURVE)


def _bits(network: nn.Module, pieces: Tensor) -> float:
    return bits(perplexity(losses(network, pieces)))


def trained(text: bytes, search: Tensor, of: Training, source: str, path: Path) -> tuple[GPT2LMHeadModel, pd.DataFrame]:
    """The trained network and its curve: from ``path`` where that is of the same parameters and text, else trained.

    Args:
        text: to train on.
        search: windows that the curve is followed on.
        of: the parameters.
        source: hash of all text.
        path: where the weights lie, or are written.
    """
    draw = runtime.start(of.threads, of.seed, "train language model")
    network = gpt(of)
    about = {**asdict(of), "text": source}
    if path.is_file():
        tensors, header = read_tensors(path)
        if header["about"] == about:
            network.load_state_dict(tensors)
            return network.eval(), pd.DataFrame(header["curve"], columns=CURVE)
    curve = train(network, text, search, of, draw)
    write_network(path, network.eval(), {"about": about, "curve": curve.to_dict("records")})
    return network, curve


def kind(layer: str, kinds: Mapping[str, str] = KINDS) -> str:
    """What a layer does; nothing where it has none of these names."""
    return next((kind for end, kind in kinds.items() if layer.endswith(end)), "")


def block(layer: str) -> int | None:
    """The block a layer lies in, from 1 on; none of the head."""
    return next((int(part) + 1 for part in layer.split(".") if part.isdigit()), None)


def utilization(network: nn.Module, score: NegativePerplexity, inputs: Tensor, of: Settings) -> pd.DataFrame:
    """Utilized ranks at each tolerance of the perplexity, and at the energy: one row a layer and tolerance."""
    unaltered = -score(network)
    asked: dict[str, dict[str, Any]] = {
        f"{100 * part:g}% of the perplexity": {"epsilon": part * unaltered, "score": score} for part in of.tolerances
    }
    asked[f"{100 * of.energy:g}% of the variance"] = {"energy": of.energy}
    found = []
    for tolerance, how in asked.items():
        layers = ur.measure(network, calibration=inputs, **how).to_frame()
        layers.insert(1, "kind", layers.layer.map(kind))
        layers.insert(2, "block", layers.layer.map(block).astype("Int64"))
        found.append(layers.assign(tolerance=tolerance))
        print(f"{tolerance}: MLU {100 * layers.utilization.mean():.1f}%")
    columns = [
        "layer",
        "kind",
        "block",
        "shape",
        "m",
        "n",
        "weight_rank",
        "tolerance",
        "k_s",
        "k_t",
        "r",
        "utilization",
    ]
    return pd.concat(found)[columns]


def compression(
    network: nn.Module, score: NegativePerplexity, inputs: Tensor, test: Tensor, of: Settings
) -> pd.DataFrame:
    """The network, then smaller ones, and how each does on the windows of ``test``: one row a network.

    Columns: asked, method, parameters, parameters_kept, flops_kept, search_perplexity, perplexity, bits_per_byte, and,
    of the perplexity in percent, change, low, high; seconds that it took to make it.
    """
    allowed = max(of.tolerances)
    asked: list[tuple[str, Method, dict[str, Any]]] = [
        (f"{kept:.0%} of the parameters", method, {"params": kept}) for kept in of.kept for method in of.methods
    ]
    within = {"epsilon": -allowed * score(network), "score": score}
    asked.append((f"within {allowed:.0%} of the perplexity", of.methods[0], within))
    before, size = losses(network, test), _size(network, inputs)
    rows = [{"asked": "the whole network", "method": WHOLE, **_row(network, size, before, before, score, inputs, of)}]
    for words, method, how in asked:
        start = time.perf_counter()
        small = ur.compress(network, inputs, **how, method=method, loss_inputs=of.loss_inputs, progress=False)
        seconds = time.perf_counter() - start
        row = _row(small, size, before, losses(small, test), score, inputs, of)
        rows.append({"asked": words, "method": method, **row, "seconds": seconds})
        print(f"{words}, {method}: perplexity {row['perplexity']:.3f} ({row['change']:+.2f}%)", flush=True)
    return pd.DataFrame(rows)


def _size(network: nn.Module, inputs: Tensor) -> tuple[int, int]:
    return cost.parameters(network), cost.flops(network, inputs[:1])


def _row(
    network: nn.Module,
    whole: tuple[int, int],
    before: np.ndarray,
    after: np.ndarray,
    score: NegativePerplexity,
    inputs: Tensor,
    of: Settings,
) -> dict[str, Any]:
    parameters, flops = _size(network, inputs)
    change = paired_change(before, after, of.draws, of.training.seed)
    return {
        "parameters": parameters,
        "parameters_kept": parameters / whole[0],
        "flops_kept": flops / whole[1],
        "search_perplexity": -score(network),
        "perplexity": perplexity(after),
        "bits_per_byte": bits(perplexity(after)),
        "change": change.percent,
        "low": change.low,
        "high": change.high,
    }


def vision(reports: Path, epsilon: float = 1.0) -> pd.DataFrame:
    """Utilization within ``epsilon`` points of the studies' networks that were trained with labels.

    Columns: data, network, layer, kind (of a transformer's), block, r, utilization; of several seeds, the first.
    """
    found = []
    for path in sorted(reports.glob("*/summary.json")):
        title = read_json(path.with_name("provenance.json"))["title"]
        seen = set()
        for name, run in read_json(path).items():
            network = run["label"].split(" (")[0]
            if run["supervision"] != "supervised" or network in seen:
                continue
            seen.add(network)
            layers = read_table(path.parent / "results" / f"measure-{name}.csv").query("epsilon == @epsilon")
            found.append(layers.assign(data=title, network=network))
    layers = pd.concat(found, ignore_index=True)
    layers["kind"] = [kind(layer, VIT) for layer in layers.layer]
    layers["block"] = layers.layer.map(block).astype("Int64")
    return layers[["data", "network", "layer", "kind", "block", "r", "utilization"]]


def beside(own: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Mean layer utilization of every network: network, data, tolerance, layers, mlu."""
    own = own.assign(network="GPT", data="Python's reference")
    others = others.assign(tolerance="1 point of accuracy")
    groups = pd.concat([own, others]).groupby(["network", "data", "tolerance"], sort=False)
    return groups.utilization.agg(layers="size", mlu="mean").reset_index()


def run(of: Settings, documents: Mapping[str, str], weights: Path, report: Path) -> None:
    """Train, or read what was trained; measure; make smaller; write tables, figures and the record.

    Args:
        of: all parameters.
        documents: texts by name.
        weights: where those of the network lie.
        report: folder that is written.
    """
    its = of.training
    names = split(documents, {"search": its.search, "test": its.test}, its.seed)
    texts = {part: joined(documents[name] for name in names[part]) for part in names}
    pieces = {part: windows(text, its.context) for part, text in texts.items()}
    inputs = spread(pieces["train"], of.calibration)[:, :-1]
    score = NegativePerplexity(spread(pieces["search"], of.search))
    network, curve = trained(texts["train"], pieces["search"], its, text_hash(documents), weights)
    clock = [time.perf_counter()]
    used = utilization(network, score, inputs, of)
    clock.append(time.perf_counter())
    made = compression(network, score, inputs, pieces["test"], of)
    clock.append(time.perf_counter())
    others = vision(ROOT / "reports")
    for name, table in {
        "training": curve,
        "utilization": used,
        "compression": made,
        "beside": beside(used, others),
    }.items():
        write_table(report / f"{name}.csv", table)
    untrained = baselines(texts["train"], texts["test"])
    style.use()
    style.save(figures.utilization(used, others), report / "utilization.svg")
    style.save(figures.compression(made), report / "compression.svg")
    unaltered = made.iloc[0]
    record = {
        "parameters": asdict(of),
        "network": {"parameters": int(unaltered.parameters), "layers": used.layer.nunique()},
        "text": {
            "source": "pydoc_data.topics",
            "sha256": text_hash(documents),
            "bytes": {part: len(text) for part, text in texts.items()},
            "windows": {part: len(rows) for part, rows in pieces.items()},
            "topics": {part: sorted(its) for part, its in names.items()},
        },
        "perplexity": {
            "search": perplexity(losses(network, pieces["search"])),
            "search, windows that ranks are searched on": -score(network),
            "test": unaltered.perplexity,
        },
        "bits per byte of the test text": {"GPT": unaltered.bits_per_byte, **untrained},
        "seconds": {
            "training": curve.seconds.iloc[-1],
            **dict(zip(("measuring", "compression"), np.diff(clock).tolist(), strict=True)),
        },
        "device": "cpu",
        "threads": its.threads,
        "processor": runtime.processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }
    write_json(report / "record.json", record)


if __name__ == "__main__":
    run(
        Settings(),
        topics(),
        ROOT / "data" / "language_model" / "gpt.safetensors",
        ROOT / "reports" / "language_model",
    )
