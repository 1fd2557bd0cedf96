"""A recipe: named models and corpora, each made of others, and the arms that are compared."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from micota_fast.config.checks import at_least, check_names
from micota_fast.config.corpus import FilterSettings
from micota_fast.config.evaluation import AlignSettings, EvaluateSettings
from micota_fast.config.generation import COLUMNS, PROBLEMS, GenerateSettings
from micota_fast.config.loader import option
from micota_fast.config.report import ClaimsConfig
from micota_fast.config.scoring import TOP_K, TOP_K_DOC, check_top_k
from micota_fast.config.suggestions import did_you_mean
from micota_fast.config.train import TrainSettings
from micota_fast.errors import InputError

SEEDS_APART = 1000  # of sampling in rounds, from one seed of training to the next
MOST_ROUNDS = SEEDS_APART - 1
_ROUND = re.compile(r".*-round\d+")


@dataclass(kw_only=True)
class ProblemsSpec:
    """A file of training problems."""

    path: str = option(doc=PROBLEMS)
    columns: dict[str, str] = option({}, doc=COLUMNS, newer=True)
    limit: int | None = option(None, doc="only the first N; null: all")

    def __post_init__(self) -> None:
        if self.limit is not None:
            at_least(self, limit=1)


@dataclass(kw_only=True)
class TrainedModel:
    """A model made by fine-tuning another."""

    base: str = option(doc="name under `models`")
    corpus: str = option(doc="name under `corpora`")
    overrides: dict[str, Any] = option(
        {}, doc="options of the recipe's `train` that are different for this model", alias="set"
    )


@dataclass(kw_only=True)
class MergedModel:
    """A model made by merging; `mergekit` is written to a file as it stands, with names under `models` resolved."""

    mergekit: dict[str, Any] = option(doc="a mergekit configuration whose model names are names under `models`")
    seed: int = option(0, doc="seed of DARE's mask")
    median_tokens: int | None = option(
        None,
        doc="choose the weight so that answers have this median length: merge at several weights, sample and "
        "interpolate (see `micota length-sweep`); null: use the configuration's weight",
    )
    problems: str = option("train", doc="name under `problems` of the set that is answered for `median_tokens`")
    sweep: dict[str, Any] = option({}, doc="options of the length sweep; sampling and grading default to the recipe's")

    def __post_init__(self) -> None:
        if self.median_tokens is not None:
            at_least(self, median_tokens=1)
        elif self.sweep:
            raise InputError("`sweep` is only used with `median_tokens`; set that, too")


@dataclass(kw_only=True)
class ModelSpec:
    """A checkpoint, or how it is made of others."""

    checkpoint: str | None = option(None, doc="folder (relative to the recipe) or hub name")
    served: str | None = option(
        None,
        doc="instead of a checkpoint: the name that the API at `url` uses for a model that only writes corpora "
        "(`generate.api: openai`)",
        operational=True,
    )
    train: TrainedModel | None = option(None, doc="fine-tuned from another model")
    merge: MergedModel | None = option(None, doc="merged from other models")
    url: str | list[str] | None = option(
        None, doc="servers that already serve this model, one or a list", operational=True
    )
    serve: dict[str, Any] = option({}, doc="overrides of `generate.serve` and `evaluate.serve` for this model")

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.checkpoint, self.served, self.train, self.merge)) != 1:
            raise InputError(
                "set exactly one of `checkpoint`, `served`, `train`, `merge`: it says where this model comes from"
            )
        if self.served is not None and self.url is None:
            raise InputError("`served` needs `url`, the address of the API that serves it, up to /v1")
        if self.url is not None and (self.train is not None or self.merge is not None):
            raise InputError("`url` cannot be set for a model that is made in the run: the run serves it")


@dataclass(kw_only=True)
class GeneratedCorpus:
    """A corpus written by a model and filtered."""

    model: str = option(doc="name under `models`")
    problems: str = option("train", doc="name under `problems`")
    overrides: dict[str, Any] = option(
        {}, doc="options of the recipe's `generate` that are different for this corpus", alias="set"
    )
    filter: dict[str, Any] = option({}, doc="options of the recipe's `filter` that are different for this corpus")


@dataclass(kw_only=True)
class ScoredCorpus:
    """A corpus with a model's distribution at each position of its answers, which the student learns (`train.soft`)."""

    of: str = option(doc="name under `corpora`: the answers, as `micota generate` writes them")
    by: str = option(doc="name under `models`: the model that scores them")
    top: int = option(TOP_K, doc=TOP_K_DOC, source="ours")

    def __post_init__(self) -> None:
        check_top_k(self, "top")


@dataclass(kw_only=True)
class OnPolicyCorpus:
    """The student's own answers, written, scored and learned in rounds, anew in each training that uses them.

    In each round the current student answers the next problems, another model gives its distribution at each position
    of these answers, and the student is trained on that. Each round is a training of its own: a new optimizer and the
    whole schedule of `train`, with the overrides of the arm or model. An answer that is cut off is left out: a training
    text ends with an end of turn, and such an answer has none. So is one that `filter` rejects by `max_tokens`,
    `max_foreign` or `max_repeated`.
    """

    by: str = option(doc="name under `models`: the model that scores the student's answers")
    rounds: int = option(doc=f"number of rounds in which the student answers and is trained, at most {MOST_ROUNDS}")
    problems: str = option("train", doc="name under `problems`")
    problems_per_round: int = option(
        doc="problems answered in a round, in the file's order; each round takes the next ones, and the first "
        "problem follows the last"
    )
    top: int = option(TOP_K, doc=TOP_K_DOC, source="ours")
    keep: Literal["all", "right"] = option(
        "all",
        doc="answers that are scored and learned. right: those that `filter` accepts; all: also wrong ones and ones "
        "without a box, but none that is cut off or that `filter` rejects by `max_tokens`, `max_foreign` or "
        "`max_repeated`",
        source="all: Agarwal et al., arXiv 2306.13649",
    )
    overrides: dict[str, Any] = option(
        {},
        doc="options of the recipe's `generate` that are different for these answers, e.g. {temperature: 1.0}; the "
        f"seed of sampling is `seed` + {SEEDS_APART} * the training's seed + the round's number",
    )

    def __post_init__(self) -> None:
        at_least(self, rounds=1, problems_per_round=1)
        if self.rounds > MOST_ROUNDS:
            raise InputError(f"`rounds` must be at most {MOST_ROUNDS}, not {self.rounds}")
        if (asked := self.rounds * self.problems_per_round) >= 2**63:  # the last round begins at a number of 64 bits
            raise InputError(f"`rounds` times `problems_per_round` must fit 64 bits, not {asked}")
        check_top_k(self, "top")
        for key in ("url", "api", "slice"):
            if key in self.overrides:
                raise InputError(
                    f"`overrides` sets `{key}`: the run starts servers for the student of each round and chooses its "
                    "problems by `problems_per_round`; leave it out"
                )


@dataclass(kw_only=True)
class CorpusSpec:
    """Rows to train on, and where they come from."""

    file: str | None = option(None, doc="an existing corpus, in any form that `micota train` reads")
    columns: dict[str, str] = option({}, doc="our key -> the file's key, as `columns` of `micota train`", newer=True)
    generate: GeneratedCorpus | None = option(None, doc="answers of a model, filtered")
    mix: dict[str, int] | None = option(None, doc="names under `corpora` -> shares")
    score: ScoredCorpus | None = option(None, doc="another corpus, with a model's distributions to learn", newer=True)
    on_policy: OnPolicyCorpus | None = option(
        None, doc="the student's own answers in rounds, with a model's distributions to learn", newer=True
    )

    def __post_init__(self) -> None:
        ways = self.file, self.generate, self.mix, self.score, self.on_policy
        if sum(way is not None for way in ways) != 1:
            raise InputError(
                "set exactly one of `file`, `generate`, `mix`, `score`, `on_policy`: it says where this corpus comes "
                "from"
            )
        if self.columns and self.file is None:
            raise InputError("`columns` goes with `file`: corpora made in the run have our keys")


@dataclass(kw_only=True)
class Arm:
    """A student that is trained with options of its own."""

    corpus: str = option(doc="name under `corpora`")
    overrides: dict[str, Any] = option({}, doc="options of the recipe's `train` that are different for this arm")

    def __post_init__(self) -> None:
        if "seed" in self.overrides:
            raise InputError("`overrides` sets `seed`, but each arm is trained once per seed of the recipe's `seeds`")


@dataclass(kw_only=True)
class LaunchConfig:
    """How the stages are run on this machine."""

    jobs: int = option(1, doc="stages run at once")
    nproc: int = option(1, doc="processes of a training stage (torchrun --nproc-per-node)")
    threads: int | None = option(None, doc="OMP_NUM_THREADS of a stage; null: from the environment")

    def __post_init__(self) -> None:
        at_least(self, jobs=1, nproc=1)
        if self.threads is not None:
            at_least(self, threads=1)


@dataclass(kw_only=True)
class Recipe:
    """A whole run: named models and corpora, each made of others, and the arms that are compared."""

    name: str = option(doc="name of the run's folder under runs/")
    title: str = option("", doc="heading of the report; empty: the name")
    seeds: list[int] = option([0], doc="each arm is trained once per seed")
    data_dir: str | None = option(
        None, doc="folder to which the paths of problem and corpus files are relative; null: the recipe's folder"
    )
    problems: dict[str, ProblemsSpec] = option({}, doc="name -> training problems")
    models: dict[str, ModelSpec] = option(doc="name -> model")
    corpora: dict[str, CorpusSpec] = option(doc="name -> corpus")
    student: str = option(doc="the model that every arm starts from, name under `models`")
    arms: dict[str, str | Arm] = option(
        doc="arm -> corpus it is trained on, or {corpus, overrides}, in the table's order"
    )
    align: list[str] = option([], doc="corpora measured under the untrained student, in the plot's order")
    student_answers: str | None = option(
        None,
        doc="corpus generated by the student; the corpora in `align` are compared with its answers (overlap)",
        alias="own",
    )
    generate: GenerateSettings = option(GenerateSettings(), doc="defaults of every generated corpus")
    filter: FilterSettings = option(FilterSettings(), doc="defaults of every filter")
    train: TrainSettings = option(TrainSettings(), doc="defaults of every training")
    evaluate: EvaluateSettings = option(EvaluateSettings(), doc="evaluation of every arm")
    alignment: AlignSettings = option(AlignSettings(), doc="measurement of corpora under the student")
    launch: LaunchConfig = option(LaunchConfig(), doc="processes and threads")
    claims: ClaimsConfig | None = option(None, doc="published differences, printed next to the measured ones")
    notes: list[str] = option([], doc="paragraphs for the report")

    @property
    def students(self) -> dict[str, Arm]:
        """Return the arms, those that are named by their corpus alone included."""
        return {name: Arm(corpus=arm) if isinstance(arm, str) else arm for name, arm in self.arms.items()}

    def __post_init__(self) -> None:
        def known(name: str, table: dict[str, Any], where: str, kind: str) -> None:
            if name not in table:
                asked = did_you_mean(name, table, f"known: {', '.join(table) or 'none'}")
                raise InputError(f"`{where}` names the {kind} {name!r}; {asked}")

        def exists_before(name: str, where: str) -> None:
            if self.corpora[name].on_policy is not None:
                raise InputError(
                    f"`{where}` names {name!r}, whose rows are generated during each training (`on_policy`); name a "
                    "corpus that exists before the training"
                )

        check_names("name", [self.name])
        for table in ("problems", "models", "corpora", "arms"):
            check_names(table, getattr(self, table))
        for part in ("generate", "evaluate"):
            if getattr(self, part).url is not None:
                raise InputError(f"`{part}.url` would apply to every model; set it for one: models.NAME.url")
        known(self.student, self.models, "student", "model")
        for name, model in self.models.items():
            if model.train is not None:
                known(model.train.base, self.models, f"models.{name}.train.base", "model")
                known(model.train.corpus, self.corpora, f"models.{name}.train.corpus", "corpus")
                corpus = self.corpora[model.train.corpus]
                if (corpus.score or corpus.on_policy) is not None and model.train.base != self.student:
                    raise InputError(
                        f"`models.{name}.train.corpus` names {model.train.corpus!r}, whose scores use the token ids "
                        f"of `student`, {self.student!r}; only that model can be trained on them"
                    )
            if model.merge is not None and model.merge.median_tokens is not None:
                known(model.merge.problems, self.problems, f"models.{name}.merge.problems", "problem set")
        for name, corpus in self.corpora.items():
            if corpus.generate is not None:
                known(corpus.generate.model, self.models, f"corpora.{name}.generate.model", "model")
                known(corpus.generate.problems, self.problems, f"corpora.{name}.generate.problems", "problem set")
            for part in corpus.mix or {}:
                known(part, self.corpora, f"corpora.{name}.mix", "corpus")
                if self.corpora[part].columns:
                    raise InputError(f"`corpora.{name}.mix` names {part!r}: a mix copies rows without `columns`")
                if self.corpora[part].score is not None:
                    raise InputError(
                        f"`corpora.{name}.mix` names {part!r}: a mix copies texts without scores; score the mix instead"
                    )
                exists_before(part, f"corpora.{name}.mix")
            if corpus.score is not None:
                known(corpus.score.of, self.corpora, f"corpora.{name}.score.of", "corpus")
                known(corpus.score.by, self.models, f"corpora.{name}.score.by", "model")
                exists_before(corpus.score.of, f"corpora.{name}.score.of")
                of = self.corpora[corpus.score.of]
                if of.score is not None:
                    raise InputError(f"`corpora.{name}.score.of` names {corpus.score.of!r}, which is scored itself")
                if of.columns:
                    raise InputError(
                        f"`corpora.{name}.score.of` names {corpus.score.of!r}: only rows with our keys can be scored"
                    )
            if corpus.on_policy is not None:
                known(corpus.on_policy.by, self.models, f"corpora.{name}.on_policy.by", "model")
                known(corpus.on_policy.problems, self.problems, f"corpora.{name}.on_policy.problems", "problem set")
        if any(corpus.on_policy is not None for corpus in self.corpora.values()):
            for table in ("models", "corpora"):
                for name in getattr(self, table):
                    if _ROUND.fullmatch(name):
                        raise InputError(
                            f"`{table}.{name}`: names ending in -round and a number belong to rounds; rename it"
                        )
        for name, arm in self.students.items():
            known(arm.corpus, self.corpora, f"arms.{name}", "corpus")
        trained_on = [arm.corpus for arm in self.students.values()]
        trained_on += [model.train.corpus for model in self.models.values() if model.train]
        scored = (self.corpora[corpus].score or self.corpora[corpus].on_policy for corpus in trained_on)
        if self.train.soft is not None and not any(scored):
            raise InputError(
                "`train.soft` needs a corpus with `score` or `on_policy`: no corpus that is trained on has "
                "distributions"
            )
        for name in self.claims.deltas if self.claims is not None else ():
            known(name, self.arms, "claims.deltas", "arm")
        for corpus_name in self.align:
            known(corpus_name, self.corpora, "align", "corpus")
            exists_before(corpus_name, "align")
        if self.student_answers is not None:
            known(self.student_answers, self.corpora, "student_answers", "corpus")
            by = self.corpora[self.student_answers].generate
            if by is None or by.model != self.student:
                raise InputError(
                    f"`student_answers` names the corpus {self.student_answers!r}, which is not generated by "
                    f"{self.student!r}"
                )
        if not self.evaluate.benchmarks:
            raise InputError("`evaluate.benchmarks` must list at least one benchmark")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError("`seeds` must be a list of different numbers, at least one")
