"""A recipe as a graph of stages: which must run, with which configuration, made of which others."""

import copy
import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from micota_fast.common.records import benchmark_file, score_file
from micota_fast.config.corpus import FilterConfig, MixConfig
from micota_fast.config.evaluation import AlignConfig, BenchmarkConfig, ContaminationConfig, EvaluateConfig
from micota_fast.config.generation import SamplingSettings
from micota_fast.config.merge import LengthSweepConfig, LengthSweepSettings, MergeConfig
from micota_fast.config.recipe import Recipe
from micota_fast.config.report import PARTS, STUDENT, ReportConfig, TrainingAnswersConfig
from micota_fast.errors import InputError
from micota_fast.merge.mergekit import parse_mergekit
from micota_fast.pipeline.answers import COMPLETIONS, CORPUS, answer_options, answer_stage, filter_options, filter_stage
from micota_fast.pipeline.builder import Builder
from micota_fast.pipeline.own_samples import check_own_samples
from micota_fast.pipeline.provenance import provenance
from micota_fast.pipeline.rounds import check_problems, corpora_of_rounds, round_stages, rounds_of
from micota_fast.pipeline.scores import score_stage
from micota_fast.pipeline.stage import Artefact, Lasting, Stage
from micota_fast.pipeline.training import train_stage

BASE = "base"  # the arm that is not trained


def build_stages(recipe: Recipe, recipe_path: Path, run_dir: Path, absent: list[str] | None = None) -> list[Stage]:
    """Return all stages that the recipe's arms, alignment and report need, each after those it depends on.

    Args:
        recipe: loaded from `recipe_path`.
        recipe_path: of the recipe; relative checkpoints start from its folder.
        run_dir: folder of the run.
        absent: takes up what is missing (a file, a checkpoint, matplotlib); None: that is an error.

    Raises:
        InputError: a file or checkpoint that the recipe names is missing, an override is bad, or models and corpora
            are made of each other in a circle.
    """
    graph = _Graph(recipe, recipe_path, run_dir, absent)
    absent = [name for name in ("matplotlib", "latex2mathml") if importlib.util.find_spec(name) is None]
    if absent:
        graph.miss(f"the report at the end needs {' and '.join(absent)}: pip install 'micota-fast[report]'")
    return graph.stages()


class _Graph(Builder):
    def stages(self) -> list[Stage]:
        self._report()
        rounds: dict[str, list[str]] = {}
        for name, corpus in corpora_of_rounds(self.recipe).items():
            if f"answers/{name}" in self.made:
                rounds.setdefault(corpus, []).append(name)
        for corpus, names in rounds.items():
            check_problems(self, corpus, names)
        return list(self.made.values())

    def model(self, name: str) -> Artefact:
        spec = self.recipe.models[name]
        stage = f"model/{name}"
        if spec.served is not None:
            raise InputError(
                f"{self.path}, `models.{name}`: it is only `served`, so it can write corpora with "
                f"`generate.api: openai`; what is asked of it here needs a `checkpoint`"
            )
        if spec.checkpoint is not None:
            return self.checkpoint(spec.checkpoint, f"models.{name}.checkpoint")
        if spec.train is not None:
            trained = spec.train
            where = f"models.{name}.train.overrides"
            result = self._result(stage, trained.corpus)
            self.once(result, lambda: self._train(stage, trained.base, trained.corpus, trained.overrides, where))
            return self.artefact(result, "model")
        self.once(stage, lambda: self._merge_stage(stage, name))
        return self.artefact(stage, "model")

    def _result(self, stage: str, corpus: str) -> str:
        """Return the stage whose model is the result of a training: of one in rounds the last round's."""
        rounds = self.recipe.corpora[corpus].on_policy
        return stage if rounds is None else rounds_of(stage, rounds)[-1].stage

    def _train(self, stage: str, base: str, corpus: str, overrides: dict[str, Any], where: str) -> None:
        model = self.model(base)
        rounds = self.recipe.corpora[corpus].on_policy
        if rounds is not None:
            round_stages(self, stage, corpus, model, self.model(rounds.by), overrides, where)
            return
        data, scores = self.corpus(corpus), self._scores(corpus)
        spec = self.recipe.corpora[corpus]
        train_stage(self, stage, model, data, spec.columns, scores, overrides, where)
        soft = self.made[stage].settings.soft
        if spec.score is not None and soft.divergence == "reverse":
            check_own_samples(self, spec.score.of, f"corpora.{corpus}.score.of")

    def _merge_stage(self, stage: str, name: str) -> None:
        spec = self.recipe.models[name].merge
        assert spec is not None
        content = copy.deepcopy(spec.mergekit)
        where = f"{self.path}, `models.{name}.merge.mergekit`"
        merge = parse_mergekit(content, where)  # a mistake shows now, not after the models to merge have been trained
        inputs: list[Artefact] = []
        for holder, key in _model_names(content):
            if holder[key] not in self.recipe.models:
                raise InputError(f"{self.path}, `models.{name}.merge`: {holder[key]!r} is not a name under `models`")
            artefact = self.model(holder[key])
            inputs.append(artefact)
            holder[key] = artefact.location
        file = self.out(stage, "mergekit.yaml")
        files = {"mergekit.yaml": yaml.safe_dump(content, sort_keys=False)}
        if spec.median_tokens is None:
            settings = MergeConfig(config=file, out=self.out(stage, "model"), seed=spec.seed)
            self.add(Stage(stage, "merge", settings, tuple(inputs), ("model",), files))
            return
        source = self.recipe.problems[spec.problems]
        problems = self.file(source.path, f"problems.{spec.problems}.path")
        served = self.served(self.recipe.generate, name)
        sampling = {field.name: getattr(served, field.name) for field in dataclasses.fields(SamplingSettings)}
        grading = {name: getattr(self.recipe.filter, name) for name in ("timeout_s", "workers")}
        sweep = self.settings(
            LengthSweepConfig,
            LengthSweepSettings(generate=SamplingSettings(**sampling | {"top_logprobs": 0}), **grading),
            spec.sweep,
            f"models.{name}.merge.sweep",
            config=file,
            problems=problems.location,
            columns=source.columns,
            out=str(self.run_dir / stage),
            seed=spec.seed,
            target_median_tokens=spec.median_tokens,
        )
        try:
            for weight in sweep.weights:
                merge.with_weight(weight)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        sweep.generate.chat, template = self.template(sweep.generate.chat, "generate.chat")
        if source.limit is not None:
            sweep.limit = min(source.limit, sweep.limit or source.limit)
        self.add(
            Stage(
                stage,
                "length-sweep",
                sweep,
                (*inputs, problems, *template),
                ("model", "sweep.json", "sweep.md", "sweep.svg", "sweep.png"),
                files,
            )
        )

    def corpus(self, name: str) -> Artefact:
        """Return the rows of a corpus; of a scored one those that are scored."""
        spec = self.recipe.corpora[name]
        if spec.score is not None:
            return self.corpus(spec.score.of)
        if spec.file is not None:
            return self.file(spec.file, f"corpora.{name}.file")
        stage = f"corpus/{name}"
        self.once(stage, lambda: self._generated(name) if spec.generate is not None else self._mixed(stage, name))
        return self.artefact(stage, CORPUS)

    def _scores(self, name: str) -> Artefact | None:
        """Return the scores of a scored corpus, and None of another."""
        spec = self.recipe.corpora[name].score
        if spec is None:
            return None
        model, student = self.model(spec.by), self.model(self.recipe.student)
        where = f"corpora.{name}.score.by"
        chat = self.recipe.train.chat
        return score_stage(self, name, where, spec.by, spec.top, self.corpus(name), model, student, chat)

    def _generated(self, name: str) -> None:
        self._answers(name)
        filter_stage(self, name, self._filter(name))

    def _filter(self, name: str) -> FilterConfig:
        spec = self.recipe.corpora[name].generate
        assert spec is not None
        return filter_options(self, name, spec.filter, f"corpora.{name}.generate.filter")

    def _answers(self, name: str) -> Artefact:
        """Return all answers that a generated corpus is filtered from."""
        stage = f"answers/{name}"
        self.once(stage, lambda: self._generate(name))
        return self.artefact(stage, COMPLETIONS)

    def _generate(self, name: str) -> None:
        spec = self.recipe.corpora[name].generate
        assert spec is not None
        served, where = self.served(self.recipe.generate, spec.model), f"corpora.{name}.generate.overrides"
        rules = self._filter(name)
        known_as = self._api_name(spec.model)
        options = answer_options(self, name, spec.problems, known_as, served, spec.overrides, where, rules)
        # With an API there need be no checkpoint here.
        model = None if options.api == "openai" else self.model(spec.model)
        answer_stage(self, name, spec.problems, options, model)

    def _api_name(self, name: str) -> str:
        """Return the name by which an API knows a model."""
        spec = self.recipe.models[name]
        return spec.served or spec.checkpoint or name

    def _mixed(self, stage: str, name: str) -> None:
        shares = self.recipe.corpora[name].mix
        assert shares is not None
        parts = {part: self.corpus(part) for part in shares}
        settings = MixConfig(
            parts={parts[part].location: share for part, share in shares.items()},
            out=self.out(stage, "corpus.jsonl"),
            seed=self.recipe.train.seed,
        )
        self.add(Stage(stage, "mix", settings, tuple(parts.values()), ("corpus.jsonl",)))

    def _benchmarks(self) -> tuple[list[BenchmarkConfig], list[Artefact]]:
        """Return the benchmarks with the paths of their files, and the files."""
        named = self.recipe.evaluate.benchmarks
        files = [self.file(benchmark.path, f"evaluate.benchmarks.{i}.path") for i, benchmark in enumerate(named)]
        placed = [dataclasses.replace(b, path=file.location) for b, file in zip(named, files, strict=True)]
        return placed, files

    def _evaluate(self, stage: str, model: Artefact, served_as: str) -> None:
        settings = self.served(self.recipe.evaluate, served_as)
        if model.stage is not None:
            # A server that already runs serves another model than this one.
            settings = dataclasses.replace(settings, url=None, api="sglang")
        settings.benchmarks, files = self._benchmarks()
        built = self.settings(
            EvaluateConfig, settings, {}, "evaluate", model=model.location, out=str(self.run_dir / stage)
        )
        inputs = [model, *files]
        if built.judge is not None and built.judge.api == "sglang":
            inputs.append(self.checkpoint(built.judge.model, "evaluate.judge.model"))
            built.judge.model = inputs[-1].location
        built.chat, template = self.template(built.chat, "evaluate.chat")
        inputs += template
        files_of = {benchmark.name: benchmark_file(benchmark.name) for benchmark in built.benchmarks}
        answers = [f"completions/{file}" for file in files_of.values()]
        outputs = ("results.json", "rows", *answers, *(f"{file}.meta.json" for file in answers))
        lasting = tuple(part for name, file in files_of.items() for part in _lasting(name, file))
        self.add(Stage(stage, "evaluate", built, tuple(inputs), outputs, lasting=lasting))

    def _report(self) -> None:
        recipe = self.recipe
        student = self.model(recipe.student)
        results: dict[str, list[Artefact]] = {BASE: [self.artefact(f"evaluate/{BASE}", "results.json")]}
        metrics: dict[str, list[Artefact]] = {}
        earlier: dict[str, list[list[Artefact]]] = {}
        self._evaluate(f"evaluate/{BASE}", student, recipe.student)
        for name, arm in recipe.students.items():
            if name == BASE:
                raise InputError(f"{self.path}, `arms`: {BASE!r} is the untouched student; give this arm another name")
            where = f"arms.{name}.overrides" if arm.overrides else "train"
            results[name], metrics[name] = [], []
            for seed in recipe.seeds:
                run = f"{name}-seed{seed}"
                self._train(f"student/{run}", recipe.student, arm.corpus, {**arm.overrides, "seed": seed}, where)
                result = self._result(f"student/{run}", arm.corpus)
                self._evaluate(f"evaluate/{run}", self.artefact(result, "model"), recipe.student)
                results[name].append(self.artefact(f"evaluate/{run}", "results.json"))
                metrics[name].append(self.artefact(result, "metrics.jsonl"))
                if (rounds := recipe.corpora[arm.corpus].on_policy) is not None:
                    before = [each.stage for each in rounds_of(f"student/{run}", rounds)[:-1]]
                    earlier.setdefault(name, []).append([self.artefact(stage, "metrics.jsonl") for stage in before])
        corpora = self._align(student)
        contamination = self._contamination()
        answers, read = self._training_answers()
        inputs = [*_flat(results.values()), *_flat(metrics.values()), *_flat(c.values() for c in corpora.values())]
        # The report also reads the rows next to each results.json.
        inputs += [self.artefact(artefact.stage or "", "rows") for artefact in _flat(results.values())]
        inputs += [*([contamination] if contamination is not None else []), *read]
        inputs += _flat(_flat(earlier.values()))
        settings = ReportConfig(
            title=recipe.title or recipe.name,
            out=str(self.run_dir / "report"),
            base=results.pop(BASE)[0].location,
            arms={arm: [artefact.location for artefact in of_arm] for arm, of_arm in results.items()},
            corpora={name: {kind: a.location for kind, a in kinds.items()} for name, kinds in corpora.items()},
            trained_on={name: arm.corpus for name, arm in recipe.students.items() if name != arm.corpus},
            training={arm: [artefact.location for artefact in of_arm] for arm, of_arm in metrics.items()},
            earlier_rounds={
                arm: [[a.location for a in of_seed] for of_seed in seeds] for arm, seeds in earlier.items()
            },
            contamination=contamination.location if contamination is not None else None,
            claims=recipe.claims,
            chance={b.name: b.chance for b in recipe.evaluate.benchmarks if b.chance is not None},
            training_answers=answers,
            notes=recipe.notes,
            provenance=provenance(recipe),
        )
        outputs = ["report.html", "answers.html", "table.md", "table.tex", "table.csv", "answers.csv", "report.json"]
        outputs += ["plots", *(["corpora.csv"] if corpora else [])]
        outputs += ["contamination.csv"] if contamination is not None else []
        self.add(Stage("report", "report", settings, tuple(inputs), tuple(outputs)))

    def _training_answers(self) -> tuple[TrainingAnswersConfig | None, list[Artefact]]:
        """Return what the report measures the method's preconditions on, and its files; nothing is answered for it."""
        names = {part: part for part in PARTS if part != STUDENT and f"corpus/{part}" in self.made}
        names = {part: name for part, name in names.items() if f"answers/{name}" in self.made}
        if not names:
            return None, []
        own = self.recipe.student_answers
        if own is not None and f"answers/{own}" in self.made and {"long", "short"} <= names.keys():
            names[STUDENT] = own  # which of it is right, nobody else may need to know
        accepted = {part: self.corpus(name) for part, name in names.items()}
        rejects = [self.artefact(f"corpus/{name}", "corpus.jsonl.rejects.jsonl") for name in names.values()]
        asked = self.made[f"answers/{next(iter(names.values()))}"]
        settings = TrainingAnswersConfig(
            answers={part: artefact.location for part, artefact in accepted.items()},
            problems=asked.settings.problems,
            columns=asked.settings.columns,
        )
        problems = next(artefact for artefact in asked.inputs if artefact.location == asked.settings.problems)
        return settings, [*accepted.values(), *rejects, problems]

    def _contamination(self) -> Artefact | None:
        """Add the search for benchmark problems in what is trained on; None if nothing is trained."""
        names = [arm.corpus for arm in self.recipe.students.values()]
        for name, model in self.recipe.models.items():
            if model.train is not None and self._result(f"model/{name}", model.train.corpus) in self.made:
                names.append(model.train.corpus)
        if not names:
            return None
        scored = {name: spec.score.of for name, spec in self.recipe.corpora.items() if spec.score is not None}
        names = [scored.get(name, name) for name in names if self.recipe.corpora[name].on_policy is None]
        corpora = {name: self.corpus(name) for name in dict.fromkeys(names)}
        rounds = [name for name in corpora_of_rounds(self.recipe) if f"corpus/{name}" in self.made]
        corpora |= {name: self.artefact(f"corpus/{name}", CORPUS) for name in rounds}
        benchmarks, files = self._benchmarks()
        settings = ContaminationConfig(
            corpora={name: artefact.location for name, artefact in corpora.items()},
            benchmarks=benchmarks,
            out=self.out("contamination", ""),
        )
        inputs = (*corpora.values(), *files)
        self.add(Stage("contamination", "contamination", settings, inputs, ("contamination.json",)))
        return self.artefact("contamination", "contamination.json")

    def _align(self, student: Artefact) -> dict[str, dict[str, Artefact]]:
        if not self.recipe.align:
            return {}
        corpora = {name: self.corpus(name) for name in self.recipe.align}
        student_answers = self.recipe.student_answers
        own = self._answers(student_answers) if student_answers is not None else None
        settings = self.settings(
            AlignConfig,
            self.recipe.alignment,
            {},
            "alignment",
            model=student.location,
            corpora={name: artefact.location for name, artefact in corpora.items()},
            columns={name: keys for name in corpora if (keys := self.recipe.corpora[name].columns)},
            student_answers=own.location if own is not None else None,
            out=str(self.run_dir / "align"),
        )
        settings.chat, template = self.template(settings.chat, "alignment.chat")
        outputs = tuple(f"{name}.json" for name in corpora)
        inputs = (student, *corpora.values(), *([own] if own is not None else []), *template)
        self.add(Stage("align", "align", settings, inputs, outputs))
        files = {name: {"alignment": self.artefact("align", f"{name}.json")} for name in corpora}
        for name in corpora:
            if self.recipe.corpora[name].generate is not None:
                files[name]["counts"] = self.artefact(f"corpus/{name}", "corpus.jsonl.counts.json")
        return files


def _lasting(benchmark: str, file: str) -> tuple[Lasting, ...]:
    """Return what an evaluation keeps of one benchmark when others are added, removed or changed.

    Answers are sampled once, and graded again whenever an option of grading changes.
    """
    item, grading = ("benchmarks", benchmark), ("protocol", "timeout_s")
    suffixes = (".parts", ".meta.json", ".meters.json", "")  # the answers last: they are only valid with their meta
    answers = tuple(f"completions/{file}{suffix}" for suffix in suffixes)
    replies = (f"judge/questions/{file}", *(f"judge/replies/{file}{suffix}" for suffix in suffixes))
    return (
        Lasting(answers, (*grading, "judge", "benchmarks.rule"), item),
        Lasting(replies, grading, item),
        Lasting((f"rows/{file}", f"scores/{score_file(benchmark)}"), (), item),
    )


def _flat(groups: Any) -> Iterator[Artefact]:
    for group in groups:
        yield from group


def _model_names(content: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the places in a mergekit configuration that hold a model's name."""
    if content.get("base_model") is not None:
        yield content, "base_model"
    for entry in content["models"]:
        yield entry, "model"
