"""What a recipe will take: tokens, FLOPs, hours, memory and disk of each stage, from shapes and stated assumptions.

Counts of stages that are done are read from what they have left. All else is a plan: shapes are exact, lengths and
efficiencies are `Assumptions`, each with its source.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from micota_fast.chat.encoding import Chat
from micota_fast.common.records import parse_line, read_lines, read_problems
from micota_fast.config.generation import ChatConfig
from micota_fast.config.recipe import LaunchConfig
from micota_fast.corpus.mix import apportion
from micota_fast.errors import InputError
from micota_fast.kernels.chunks import LOGITS_BYTES
from micota_fast.length_sweep.length_sweep import REFINEMENTS
from micota_fast.pipeline.graph import BASE, Stage
from micota_fast.planning.assumptions import GPU, KNOWN_SETS, REASONING, Assumptions
from micota_fast.planning.costs import (
    BYTES,
    Corpus,
    Cost,
    Model,
    answering,
    parameters,
    recomputed_flops,
    train_flops,
)
from micota_fast.planning.shapes import shapes_of
from micota_fast.train.memory import estimate, kept

SAMPLED_PROMPTS = 200  # tokenised to know their length, where the tokenizer is here
FITS = 0.95  # of a GPU's memory, as the trainer's own warning has it


class Planner:
    """Costs of stages, each after those it needs.

    Args:
        launch: processes of a training stage.
        gpu: that everything runs on which is not told to run on a CPU; None: there is none.
        assumed: what shapes do not say.
        answer_tokens: mean length of answers by name of a corpus, or of the student's own ("base").
        done: seconds that the stages took which are done, by name; their outputs are read.
    """

    def __init__(
        self,
        launch: LaunchConfig,
        gpu: GPU | None,
        assumed: Assumptions,
        answer_tokens: Mapping[str, float],
        done: Mapping[str, float],
    ) -> None:
        self.launch, self.gpu, self.assumed = launch, gpu, assumed
        self.answer_tokens, self.done = answer_tokens, done
        self._models: dict[str, Model] = {}  # by location
        self._corpora: dict[str, Corpus] = {}
        self._longest_assumed = 0  # tokens of an answer

    def costs(self, stages: Sequence[Stage]) -> list[Cost]:
        """Of each stage, in order.

        Raises:
            InputError: a model's shapes or a file's size cannot be known.
        """
        limits = [stage.settings.max_new_tokens for stage in stages if stage.verb in ("generate", "evaluate")]
        self._longest_assumed = max(1, max(limits) // 4)  # in a world of short answers, those assumed are short, too
        ways = {
            "generate": self._generate,
            "filter": self._filter,
            "mix": self._mix,
            "train": self._train,
            "merge": self._merge,
            "length-sweep": self._length_sweep,
            "evaluate": self._evaluate,
            "align": self._align,
        }
        costs = []
        for stage in stages:
            cost = ways[stage.verb](stage) if stage.verb in ways else Cost(stage.name, stage.verb, how="on the CPU")
            if stage.name in self.done:
                cost.done, cost.hours, cost.passing = True, self.done[stage.name] / 3600, 0
            costs.append(cost)
        return costs

    # --- what goes in ---

    def _model(self, location: str) -> Model:
        if location not in self._models:
            tokens = self.assumed.long_tokens if REASONING.search(location) else self.assumed.short_tokens
            self._models[location] = Model(shapes_of(location), min(tokens, self._longest_assumed), location)
        return self._models[location]

    def _problems(
        self, path: str, limit: int | None, model: Model, chat: ChatConfig, known: int | None = None
    ) -> tuple[int, float]:
        """How many, and mean tokens of their prompts."""
        a = self.assumed
        if not Path(path).is_file():
            count = known or KNOWN_SETS.get(Path(path).stem)
            if count is None:
                raise InputError(f"no such file: {path}; its problems must be counted")
            return min(count, limit or count), a.problem_chars / a.chars_per_token + a.template_tokens
        problems = read_problems(path, limit)
        if Path(model.folder, "tokenizer.json").is_file():
            rendered = Chat.from_checkpoint(model.folder, chat)
            lengths = [len(rendered.encode_prompt(p.problem)) for p in problems[:SAMPLED_PROMPTS]]
            return len(problems), float(np.mean(lengths))
        chars = float(np.mean([len(p.problem) for p in problems]))
        return len(problems), chars / a.chars_per_token + a.template_tokens

    def _corpus(self, location: str) -> Corpus:
        if location not in self._corpora:  # a file that was there from the beginning
            if not Path(location).is_file():
                raise InputError(f"no such file: {location}; its rows must be counted")
            self._corpora[location] = self._of_file(Path(location))
        return self._corpora[location]

    def _of_file(self, path: Path) -> Corpus:
        """A corpus of any format: our own rows say their tokens, of others the characters are counted."""
        prompts, answers = [], []
        for where, line in read_lines(path):
            row = parse_line(line, where)
            ours = "completion_tokens" in row
            text = sum(len(str(value)) for value in row.values()) / self.assumed.chars_per_token
            prompts.append(row["prompt_tokens"] if ours else self.assumed.template_tokens)
            answers.append(row["completion_tokens"] if ours else text)
        return _counted(np.array(prompts, dtype=float), np.array(answers, dtype=float))

    def _assumed(self, rows: float, prompt: float, answer: float) -> Corpus:
        length = max(1.0, prompt + answer)
        return Corpus(rows, prompt, answer, length + (self.assumed.length_cv * answer) ** 2 / length)

    def _on_gpu(self, device: str) -> bool:
        return self.gpu is not None and device != "cpu"

    # --- the stages ---

    def _generate(self, stage: Stage) -> Cost:
        s, name = stage.settings, stage.name.partition("/")[2]
        model = self._model(s.model)
        answer = min(self.answer_tokens.get(name, model.answer), s.max_new_tokens)
        if stage.name in self.done:
            answers = self._of_file(Path(s.out))
        else:
            problems, prompt = self._problems(s.problems, s.limit, model, s.chat)
            answers = self._assumed(problems * s.samples, prompt, answer)
        self._corpora[s.out] = answers
        cost = Cost(stage.name, stage.verb)
        answering(cost, model, s, [answers], self.gpu, self.assumed)
        cost.disk = answers.tokens * self.assumed.text_bytes
        return cost

    def _filter(self, stage: Stage) -> Cost:
        s = stage.settings
        answers = self._corpora[s.completions]
        if stage.name in self.done:
            accepted = self._of_file(Path(s.out))
        else:
            share = self.assumed.accepted if s.require_correct else 1.0
            accepted = dataclasses.replace(answers, rows=round(answers.rows * share), counted=False)
        self._corpora[s.out] = accepted
        disk = answers.tokens * self.assumed.text_bytes  # the rejects stand beside it
        return Cost(stage.name, stage.verb, disk=disk, how=f"{_rows(accepted)} of {answers.rows:,.0f} accepted")

    def _mix(self, stage: Stage) -> Cost:
        s = stage.settings
        if stage.name in self.done:
            mixed = self._of_file(Path(s.out))
        else:
            parts = {path: self._corpus(path) for path in s.parts}
            rows = apportion(int(min(part.rows for part in parts.values())), s.parts)
            total = max(1, sum(rows.values()))
            tokens = sum(rows[path] * (part.prompt + part.answer) for path, part in parts.items())
            mixed = Corpus(
                rows=sum(rows.values()),
                prompt=sum(rows[path] * part.prompt for path, part in parts.items()) / total,
                answer=sum(rows[path] * part.answer for path, part in parts.items()) / total,
                context=sum(rows[p] * (c.prompt + c.answer) * c.context for p, c in parts.items()) / max(1, tokens),
            )
        self._corpora[s.out] = mixed
        return Cost(stage.name, stage.verb, disk=mixed.tokens * self.assumed.text_bytes, how=_rows(mixed))

    def _train(self, stage: Stage) -> Cost:
        s, out = stage.settings, Path(stage.settings.out)
        model, corpus = self._model(s.model), self._corpus(s.data)
        self._models[str(out / "model")] = model._replace(answer=corpus.answer)
        steps_an_epoch = math.ceil(corpus.tokens / (s.pack_tokens * self.assumed.pack_fill * s.packs_per_step)) or 1
        steps = min(math.ceil(steps_an_epoch * s.epochs), s.max_steps or math.inf)
        tokens = min(s.epochs, steps / steps_an_epoch) * corpus.tokens
        if stage.name in self.done:
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            tokens, steps = sum(row["tokens"] for row in rows), len(rows)
        processes, size = self.launch.nproc, parameters(model.config)
        on_gpu, dtype = self._on_gpu(s.device), getattr(torch, s.dtype)
        shards = s.mesh.shard or max(1, processes // s.mesh.replicate)
        how = s.activation_checkpointing
        need = estimate(model.config, s.pack_tokens, shards, how, dtype, "cuda" if on_gpu else "cpu").total
        stored = BYTES[s.save_dtype] if s.save_dtype else model.width
        cost = Cost(
            stage.name,
            stage.verb,
            tokens=tokens,
            flops=train_flops(model.config, tokens, corpus.context),
            gpus=processes if on_gpu else 0,
            memory=need,
            disk=size * stored,
            # Weights and both moments in float32; the newest is whole before the oldest goes, and the best one stays.
            passing=12 * size * (s.keep_checkpoints + 1 + (s.validation_data is not None)),
            how=f"{_rows(corpus)}, {steps:,.0f} steps on {processes} process{'es' * (processes > 1)}",
        )
        if on_gpu and self.gpu is not None:
            if s.dtype == "bfloat16":
                run = cost.flops + recomputed_flops(model.config, tokens, corpus.context, how)
                cost.hours = run / (processes * self.gpu.flops * self.assumed.train_mfu) / 3600
            if cost.memory > FITS * self.gpu.memory:
                full = estimate(model.config, s.pack_tokens, shards, "full", dtype, "cuda").total
                cost.too_big = (
                    f"{cost.memory / 1e9:.0f} GB on each of {processes}, where there are {self.gpu.memory / 1e9:.0f} "
                    f"(`activation_checkpointing: full`: {full / 1e9:.0f})"
                )
        return cost

    def _merge(self, stage: Stage) -> Cost:
        self._models[stage.settings.out] = model = self._merged(stage)
        size = parameters(model.config)
        moved = size * model.width * (1 + len(stage.inputs))
        return Cost(
            stage.name,
            stage.verb,
            hours=moved / self.assumed.disk_rate / 3600 if self.gpu is not None else None,
            disk=size * model.width,
            how=f"{len(stage.inputs)} models read, one written, on the CPU",
        )

    def _length_sweep(self, stage: Stage) -> Cost:
        s = stage.settings
        model = self._merged(stage)
        if s.target_median_tokens is not None:
            model = model._replace(answer=float(s.target_median_tokens))
            self._models[str(Path(s.out) / "model")] = model
        sampling = s.generate
        problems, prompt = self._problems(s.problems, s.limit, model, sampling.chat)
        answers = self._assumed(problems * sampling.samples, prompt, min(model.answer, sampling.max_new_tokens))
        cost = Cost(stage.name, stage.verb)
        answering(cost, model, sampling, [answers], self.gpu, self.assumed)
        n, size = len(s.weights), parameters(model.config) * model.width
        read = sum(artefact.location in self._models for artefact in stage.inputs)
        merges = (n + (s.target_median_tokens is not None)) * size * (1 + read) / self.assumed.disk_rate / 3600
        cost.tokens, cost.flops = n * cost.tokens, n * cost.flops
        if cost.hours is not None:
            cost.hours = merges + n * cost.hours
        kept_models = (s.target_median_tokens is not None) + n * s.keep_models
        cost.disk, cost.passing = kept_models * size, 0 if s.keep_models else size
        more = f", and up to {REFINEMENTS} more to find the length" if s.target_median_tokens is not None else ""
        cost.how = f"{n} weights{more}: {cost.how}"
        return cost

    def _merged(self, stage: Stage) -> Model:
        models = [self._model(a.location) for a in stage.inputs if not a.location.endswith(".jsonl")]
        between = math.exp(sum(math.log(max(1.0, model.answer)) for model in models) / len(models))
        return models[0]._replace(answer=between)  # the geometric mean: what a merge in the middle may be hoped to give

    def _evaluate(self, stage: Stage) -> Cost:
        s = stage.settings
        model = self._model(s.model)
        answer = model.answer
        if stage.name == f"evaluate/{BASE}":
            answer = self.answer_tokens.get(BASE, answer)
        sets = []
        results = {}
        if stage.name in self.done:
            results = json.loads((Path(s.out) / "results.json").read_bytes())["benchmarks"]
        for benchmark in s.benchmarks:
            known = max(benchmark.problems, default=None)
            problems, prompt = self._problems(benchmark.path, benchmark.limit, model, s.chat, known)
            own = s.of(benchmark)
            mean = results[benchmark.name]["mean_tokens"] if results else min(answer, own.max_new_tokens)
            sets.append(self._assumed(problems * own.samples, prompt, mean))
            sets[-1].counted = bool(results)
        cost = Cost(stage.name, stage.verb)
        longest = max(s.of(benchmark).max_new_tokens for benchmark in s.benchmarks)
        answering(cost, model, dataclasses.replace(s, max_new_tokens=longest), sets, self.gpu, self.assumed)
        cost.disk = 2 * cost.tokens * self.assumed.text_bytes  # completions, and graded rows
        if s.judge is not None:
            cost.how += "; the judge is not counted"
        return cost

    def _align(self, stage: Stage) -> Cost:
        s = stage.settings
        model, corpora = self._model(s.model), [self._corpus(path) for path in s.corpora.values()]
        on_gpu, low = self._on_gpu(s.device), BYTES[s.dtype]
        cost = Cost(
            stage.name,
            stage.verb,
            tokens=sum(corpus.tokens for corpus in corpora),
            flops=sum(train_flops(model.config, corpus.tokens, corpus.context) for corpus in corpora) / 3,
            gpus=int(on_gpu),
            memory=low * (parameters(model.config) + s.pack_tokens * kept(model.config, "none"))
            + LOGITS_BYTES["cuda" if on_gpu else "cpu"],
            how=f"{len(corpora)} corpora read once",
        )
        if on_gpu and self.gpu is not None:
            cost.hours = cost.flops / (self.gpu.flops * self.assumed.prefill_mfu) / 3600
        return cost


def _counted(prompts: NDArray[np.float64], answers: NDArray[np.float64]) -> Corpus:
    lengths = prompts + answers
    if not len(lengths) or not lengths.sum():
        return Corpus(0, 0, 0, 0, counted=True)
    context = float((lengths**2).sum() / lengths.sum())
    return Corpus(len(lengths), float(prompts.mean()), float(answers.mean()), context, counted=True)


def _rows(corpus: Corpus) -> str:
    return f"{corpus.rows:,.0f} rows"
