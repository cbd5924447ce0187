# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The demo: from images to samples of their classes, and how good these are, in twenty minutes on two CPU cores.

    tokenizer    stage 1                                              out/tokenizer
    decoder      stage 2                                              out/decoder
    latents      a cache of the training images                       out/latents
    generator    a SiT of the latents                                 out/generator
    samples      some hundred of each class                           out/samples, samples.npz
    classifier   of real images                                       out/classifier
    score        what it takes the samples for; PSNR of the tokenizer demo.json, demo.html, *.png

Each part calls what its command calls, and goes on where it was stopped; out/parts.json says which ones are done, and
what they took. Generator and samples are of images as they are: all of Fashion-MNIST's shoes point to the left, so that
a mirrored one would be a picture that the set does not have. Tokenizers see mirrored ones, which shows them more.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maetok_fast import config
from maetok_fast.bench.machine import find_device
from maetok_fast.data.images import psnr, to_uint8
from maetok_fast.data.reader import to_range
from maetok_fast.data.samples import Source
from maetok_fast.demos.classifier import Classifier, read_all, train_classifier
from maetok_fast.demos.ledger import FORMAT, Ledger
from maetok_fast.demos.page import Shown, write_page
from maetok_fast.demos.plan import Plan, make_plan, product
from maetok_fast.demos.shared import HIGHEST_DB, bar, check_classes, open_images, trained
from maetok_fast.models import MAETok
from maetok_fast.pipeline import EncodingRun, Pipeline, RunError, SamplingRun
from maetok_fast.pipeline.run import equal_labels, make_folder
from maetok_fast.training.build import TrainingRun

__all__ = ["PARTS", "recognised", "run_demo", "spread"]

PARTS = ("tokenizer", "decoder", "latents", "generator", "samples", "classifier", "score")
GOALS = {"minutes": 20.0, "psnr": 22.0, "recognised": 0.7}  # of the whole demo on Fashion-MNIST, on two cores
FEW = 10  # of each class in the picture, and reconstructions in a row


def run_demo(
    out: str | Path,
    data: str = "fashion-mnist",
    test: str = "fashion-mnist:test",
    *,
    quick: bool = False,
    seed: int = 0,
    device: str = "",
    quiet: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs what is not done yet in the folder `out`, and returns what demo.json holds.

    data, test: sources with labels of the same classes (`open_source`). quick: a handful of steps, to see that
    everything works. device: "" for CUDA where there is one. quiet: no progress. say: gets a line for each part.
    DataError where the images cannot be used, RunError where `out` holds another demo, DemoStopped, and what the parts
    raise.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RunError("the demo is one process; run it without torchrun")
    out = Path(out)
    of_training, of_test = open_images(data), open_images(test)
    classes = check_classes(of_training, of_test)
    where = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    plan = make_plan(
        out, data, test, images=len(of_training), tested=len(of_test), classes=classes, seed=seed, device=device,
        quick=quick,
    )  # fmt: skip
    make_folder(out)
    asked = {"data": data, "test": test, "seed": seed, "quick": quick, "settings": _digest(plan, of_training, of_test)}
    ledger = Ledger(out / "parts.json", asked)
    demo = _Demo(out, plan, of_training, of_test, where, quiet, ledger)
    again = False  # what comes behind a part that was made again is made again
    for name in PARTS:
        if again or not (ledger.done(name) and demo.made(name).exists()):
            again = True
            with ledger.timed(name):
                told = demo.run(name)
            say(f"{name:10} {ledger.seconds(name):7.1f} s   {told}")
        else:
            say(f"{name:10} {ledger.seconds(name):7.1f} s   was there")
    found: dict[str, Any] = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    return found


def _digest(plan: Plan, *sources: Source) -> str:
    """Of all that the results depend on but the folder: settings and images."""
    texts = [source.fingerprint() for source in sources]
    for run in (plan.tokenizer, plan.decoder, plan.generator):
        lines = config.to_yaml(run).splitlines()
        texts += [line for line in lines if not line.strip().startswith(("out:", "start:", "tokenizer:", "cache:"))]
    texts += [str(v) for k, v in vars(plan).items() if k not in ("tokenizer", "decoder", "generator", "workers")]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


class _Demo:
    """The parts. Each returns what is worth saying about it."""

    def __init__(
        self, out: Path, plan: Plan, data: Source, test: Source, device: torch.device, quiet: bool, ledger: Ledger
    ) -> None:
        self.out, self.plan, self.data, self.test = out, plan, data, test
        self.device, self.quiet, self.ledger = device, quiet, ledger
        self.size = plan.tokenizer.model.size[0]

    def run(self, name: str) -> str:
        found: str = getattr(self, f"_{name}")()
        return found

    def made(self, name: str) -> Path:
        """What is there once a part is done."""
        plan = self.plan
        return {
            "tokenizer": product(plan.tokenizer, "tokenizer"),
            "decoder": product(plan.decoder, "tokenizer"),
            "latents": self.out / "latents" / "latents_stats.pt",
            "generator": product(plan.generator, "generator"),
            "samples": self.out / "samples.npz",
            "classifier": self.out / "classifier" / "classifier.safetensors",
            "score": self.out / "demo.html",
        }[name]

    # ---- the parts

    def _train(self, run: TrainingRun) -> str:
        trained(run, self.quiet)
        return f"{run.loop.steps} steps of {run.loop.batch} images: {Path(run.out) / 'report.html'}"

    def _tokenizer(self) -> str:
        return self._train(self.plan.tokenizer)

    def _decoder(self) -> str:
        return self._train(self.plan.decoder)

    def _latents(self) -> str:
        plan = self.plan
        run = EncodingRun(
            self.out / "latents",
            MAETok.from_pretrained(self.made("decoder"), device=self.device),
            self.data,
            flips=False,
            limit=plan.images,
            batch=plan.batch,
            workers=plan.workers,
        )
        run.begin()
        todo, began = run.images_in(run.missing()), time.perf_counter()
        with bar("latents", todo, quiet=self.quiet) as tick:
            run.make(tick)
        found = run.finish({"images": todo, "seconds": time.perf_counter() - began})
        return f"{found['images']} images"

    def _generator(self) -> str:
        return self._train(self.plan.generator)

    def _samples(self) -> str:
        folder = self.out / "samples"
        pipeline = Pipeline.from_pretrained(
            self.made("decoder"), self.made("generator"), device=self.device, precision=_precision(folder)
        )
        labels = equal_labels(self.plan.samples * self.plan.classes, self.plan.classes)
        about = {"weights": pipeline.fingerprint, "precision": pipeline.precision.name, "device": self.device.type}
        run = SamplingRun(folder, labels, self.plan.seed, self.plan.sampled, about, self.plan.batch)
        run.begin()
        with bar("samples", len(run.missing()), quiet=self.quiet) as tick:
            cost = run.make(pipeline, tick)
        run.finish(cost)
        return f"{len(labels)} samples, {self.plan.samples} of each class"

    def _classifier(self) -> str:
        plan = self.plan
        with bar("reading", plan.images, quiet=self.quiet) as tick:
            images, labels = read_all(self.data, self.size, plan.images, workers=plan.workers, done=tick)
        with bar("classifier", plan.images * plan.epochs, quiet=self.quiet) as tick:
            model = train_classifier(
                images, labels, plan.classes, epochs=plan.epochs, seed=plan.seed, device=self.device, done=tick
            )
        path = self.made("classifier")
        make_folder(path.parent)
        model.save(path)
        return f"{plan.epochs} epochs of {plan.images} real images"

    def _score(self) -> str:
        plan, began = self.plan, time.perf_counter()
        judge = Classifier.load(self.made("classifier"))
        with bar("test images", plan.tested, quiet=self.quiet) as tick:
            images, labels = read_all(self.test, self.size, plan.tested, workers=plan.workers, done=tick)
        results = self._reconstructed(images)
        originals = images.permute(0, 2, 3, 1).numpy()
        with np.load(self.made("samples")) as file:
            samples, asked = file["arr_0"], torch.from_numpy(file["arr_1"])
        share, each = recognised(asked, judge.predict(_tensor(samples)), plan.classes)
        found: dict[str, Any] = {
            "format": FORMAT,
            "data": plan.data,
            "test": self.test.path,
            "classes": [self._named(c) for c in range(plan.classes)],
            "seed": plan.seed,
            "quick": self.ledger.asked["quick"],
            "seconds": {name: self.ledger.seconds(name) for name in PARTS[:-1]},
            "killed_starts": self.ledger.lost(),
            "psnr": float(np.mean([min(psnr(a, b), HIGHEST_DB) for a, b in zip(originals, results)])),
            "test_images": plan.tested,
            "classifier": {
                "test_accuracy": _accuracy(judge, images, labels),
                "reconstructions": _accuracy(judge, _tensor(results), labels),
            },
            "recognised": share,
            "recognised_per_class": {self._named(c): value for c, value in enumerate(each)},
            "spread": spread(_tensor(samples), asked) / spread(images, labels),
            "samples": len(asked),
            # a start that only came to finish made none; Euler's are one a step
            "nfe": _recorded(self.out / "samples")["cost"]["nfe"] or plan.steps,
            "guidance": plan.guidance,
            "goals": GOALS,
            "settings": self._settings(),
            **_json(Path(plan.generator.out) / "environment.json"),
        }
        found["seconds"]["score"] = round(time.perf_counter() - began, 2)
        found["seconds_total"] = round(sum(found["seconds"].values()), 2)
        rows = [np.stack(samples[asked.numpy() == c][:FEW]) for c in range(plan.classes)]
        some = _some_of_each(labels, FEW)
        shown = Shown(rows, found["classes"], originals[some], results[some])
        write_page(self.out, found, shown, plan.commands(self.out, _precision(self.out / "samples")))
        return (
            f"{share:.1%} of {len(asked)} samples recognised, PSNR {found['psnr']:.2f} dB; the classifier is right "
            f"about {found['classifier']['test_accuracy']:.1%} of the test images"
        )

    # ---- of the score

    def _reconstructed(self, images: Tensor) -> np.ndarray:
        """(N, H, W, 3) uint8 of (N, 3, H, W) uint8."""
        pipeline = Pipeline.from_pretrained(self.made("decoder"), device=self.device)
        parts = []
        with bar("reconstructions", len(images), quiet=self.quiet) as tick:
            for part in images.split(self.plan.batch):
                parts.append(to_uint8(pipeline.reconstruct(to_range(part, torch.float32))))
                tick(len(part))
        return np.concatenate(parts)

    def _named(self, label: int) -> str:
        return self.data.classes[label] if label < len(self.data.classes) else str(label)

    def _settings(self) -> dict[str, Any]:
        plan = self.plan
        runs: dict[str, TrainingRun] = {
            "tokenizer": plan.tokenizer,
            "decoder": plan.decoder,
            "generator": plan.generator,
        }
        said: dict[str, Any] = {
            name: {"steps": run.loop.steps, "batch": run.loop.batch, "learning_rate": run.optimizer.learning_rate}
            for name, run in runs.items()
        }
        said["latents"] = {"images": plan.images}
        said["samples"] = {"per_class": plan.samples, **plan.sampled}
        said["classifier"] = {"epochs": plan.epochs, "images": plan.images}
        return said


def recognised(asked: Tensor, found: Tensor, classes: int) -> tuple[float, list[float]]:
    """The share of labels `asked` (N,) that were `found`, over all and for each class (nan where nobody asked)."""
    right = (asked == found).double()
    return float(right.mean()), [float(right[asked == c].mean()) for c in range(classes)]


def spread(images: Tensor, labels: Tensor) -> float:
    """How much images (N, 3, H, W) uint8 of one class differ: the root mean square of their pixels' distance to the
    class's mean image, over all classes. A generator that makes one picture a class would be recognised, and has 0."""
    total = 0.0
    for label in labels.unique():
        of_class = images[labels == label].double()
        total += float((of_class - of_class.mean(0)).square().sum())
    return (total / images.numel()) ** 0.5


def _accuracy(judge: Classifier, images: Tensor, labels: Tensor) -> float:
    return float((judge.predict(images) == labels).double().mean())


def _tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) of files -> (N, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _some_of_each(labels: Tensor, count: int) -> list[int]:
    """Places of so many images, of every class in turn where there are as many."""
    places = [(labels == c).nonzero().flatten().tolist() for c in labels.unique()]
    turns = [place[turn] for turn in range(count) for place in places if turn < len(place)]
    return turns[:count]


def _precision(samples: Path) -> str:
    """What samples are made in: what there are some of already were made in. The fastest one is measured, and may be
    another when a run goes on."""
    return str(_recorded(samples)["asked"]["precision"]) if (samples / "run.json").exists() else "auto"


def _recorded(samples: Path) -> dict[str, Any]:
    found = _json(samples / "run.json")
    if not {"asked"} <= found.keys():
        raise RunError(f"{samples / 'run.json'}: is not the record of a run; remove {samples}")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
