"""What each kind of stage costs (`stages.Verb.cost`), and what writing answers takes: the arithmetic of a plan.

Each function takes the planner and the stage, and leaves in the planner the models and corpora that the stage makes.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from micota_fast.common.dtypes import bytes_per_element
from micota_fast.common.figures import two
from micota_fast.common.gpu_specs import GPU
from micota_fast.common.json_io import parse_json
from micota_fast.common.records import read_lines
from micota_fast.common.schema import load
from micota_fast.common.urls import hide_credentials
from micota_fast.config.evaluation import JudgeConfig
from micota_fast.config.generation import GenerateConfig, SamplingSettings
from micota_fast.config.merge import REFINEMENTS
from micota_fast.config.scoring import ScoreConfig
from micota_fast.corpus.mix import apportion
from micota_fast.evaluation.results import EvaluationResults
from micota_fast.kernels.chunks import LOGITS_BYTES
from micota_fast.pipeline.graph import BASE
from micota_fast.pipeline.stage import Stage
from micota_fast.planning.assumptions import FITS, KEPT_BY_SERVERS, KEPT_FREE, Assumptions, shortfall
from micota_fast.planning.planner import ON_CPU, Corpus, Cost, Model, Planner
from micota_fast.planning.roofline import loss_seconds
from micota_fast.planning.shapes import parameters, recomputed_flops, train_flops, training
from micota_fast.serve import sglang
from micota_fast.train.memory import Levers, estimate, host_copies, host_memory, kept, moment_bytes

AT_A_SERVER = "at servers that already run"


def generate(planner: Planner, stage: Stage) -> Cost:
    """Return the cost of a `generate` stage."""
    s, name = stage.settings, stage.name.partition("/")[2]
    model = None if s.api == "openai" else planner.model(s.model)  # of a model behind an API the shapes are not known
    assumed = planner.answer_length(s.model) if model is None else model.answer
    answer = min(planner.answer_tokens.get(name, assumed), s.max_new_tokens)
    if stage.name in planner.done:
        answers = planner.counted(Path(s.out))
    else:
        problems, prompt = planner.problems(s.problems, s.limit, model, s.chat, s.columns)
        asked = problems if s.slice is None else min(problems, s.slice[1])
        answers = planner.answers(asked * s.samples, prompt, answer)
    planner.corpora[s.out] = answers
    cost = Cost(stage.name, stage.verb)
    if model is None:
        cost.tokens = answers.tokens
        cost.how = _written(s, [answers])
        dollars = s.openai.dollars(answers.rows * answers.prompt, answers.rows * answers.answer)
        cost.how += "" if dollars is None else f", ${dollars:,.2f} at the prices in `openai`"
        cost.left_out.append(AT_A_SERVER)
    else:
        answering(cost, model, s, [answers], planner.gpu, planner.assumed)
    cost.disk = answers.tokens * planner.assumed.text_bytes
    if s.top_logprobs:
        _keep_scores(cost, answers.rows * answers.answer, s.top_logprobs)
    return cost


def _keep_scores(cost: Cost, tokens: float, top_k: int) -> None:
    """Add what scores take on the disk.

    Each token leaves its id and log-probability of eight bytes, and K of its place of six. While the stage runs they
    lie in two journals as well, in one of them in base64 and without the id.
    """
    cost.disk += tokens * (8 + 6 * top_k)
    cost.passing += tokens * (8 + 6 * top_k + (4 + 6 * top_k) * 4 / 3)


def score(planner: Planner, stage: Stage) -> Cost:
    """Return the cost of a `score` stage: prompts and answers are read once, as prompts are, and nothing is written."""
    s = stage.settings
    model, corpus = planner.model(s.model), planner.corpus(s.completions)
    planner.scores[s.out] = s.top_k
    width = model.width if s.serve.dtype == "auto" else bytes_per_element(s.serve.dtype)
    config, serve = model.config, s.serve
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width
    scored = corpus.rows * (corpus.answer + 1)  # through the end of turn
    cost = Cost(
        stage.name,
        stage.verb,
        tokens=corpus.tokens,
        flops=train_flops(config, corpus.tokens, corpus.context) / 3,
        how=f"{_rows(corpus)}, {s.top_k} tokens at each of {two(scored)} positions",
    )
    _keep_scores(cost, scored, s.top_k)
    room = _serving(cost, s, parameters(config) * width, corpus.context * kv, planner.gpu, planner.assumed)
    if room is not None and planner.gpu is not None:
        speed = planner.gpu.flops * planner.assumed.prefill_mfu * serve.tp * serve.replicas * serve.dp
        cost.hours = (planner.assumed.startup_s + cost.flops / speed) / 3600
    return cost


def filter_(planner: Planner, stage: Stage) -> Cost:
    """Return the cost of a `filter` stage."""
    s = stage.settings
    answers = planner.corpora[s.completions]
    if stage.name in planner.done:
        accepted = planner.counted(Path(s.out))
    else:
        share = planner.assumed.accepted if s.require_correct else 1.0
        accepted = dataclasses.replace(answers, rows=round(answers.rows * share), counted=False)
    planner.corpora[s.out] = accepted
    disk = answers.tokens * planner.assumed.text_bytes  # the rejects are written next to it
    how = f"{_rows(accepted)} of {answers.rows:,.0f} accepted"
    return Cost(stage.name, stage.verb, disk=disk, how=how, left_out=[ON_CPU])


def mix(planner: Planner, stage: Stage) -> Cost:
    """Return the cost of a `mix` stage."""
    s = stage.settings
    if stage.name in planner.done:
        mixed = planner.counted(Path(s.out))
    else:
        parts = {path: planner.corpus(path) for path in s.parts}
        rows = apportion(int(min(part.rows for part in parts.values())), s.parts)
        total = max(1, sum(rows.values()))
        tokens = sum(rows[path] * (part.prompt + part.answer) for path, part in parts.items())
        mixed = Corpus(
            rows=sum(rows.values()),
            prompt=sum(rows[path] * part.prompt for path, part in parts.items()) / total,
            answer=sum(rows[path] * part.answer for path, part in parts.items()) / total,
            context=sum(rows[p] * (c.prompt + c.answer) * c.context for p, c in parts.items()) / max(1, tokens),
        )
    planner.corpora[s.out] = mixed
    disk = mixed.tokens * planner.assumed.text_bytes
    return Cost(stage.name, stage.verb, disk=disk, how=_rows(mixed), left_out=[ON_CPU])


def train(planner: Planner, stage: Stage) -> Cost:
    """Return the cost of a `train` stage."""
    s, out = stage.settings, Path(stage.settings.out)
    model, corpus = planner.model(s.model), planner.corpus(s.data)
    planner.models[str(out / "model")] = model._replace(answer=corpus.answer)
    pack_tokens = min(s.pack_tokens, math.ceil(corpus.tokens)) or 1  # a pack is no larger than what fills it
    steps_an_epoch = math.ceil(corpus.tokens / (s.pack_tokens * planner.assumed.pack_fill * s.packs_per_step)) or 1
    steps = min(math.ceil(steps_an_epoch * s.epochs), s.max_steps or math.inf)
    tokens = min(s.epochs, steps / steps_an_epoch) * corpus.tokens
    if stage.name in planner.done:
        lines = read_lines(out / "metrics.jsonl")
        rows = [parse_json(line, where, finite=False) for where, line in lines]
        tokens, steps = sum(row["tokens"] for row in rows), len(rows)
    processes, size = planner.launch.nproc, parameters(model.config)
    on_gpu, dtype = planner.on_gpu(s.device), getattr(torch, s.dtype)
    shards = s.mesh.shard or max(1, processes // s.mesh.replicate)
    how = s.activation_checkpointing
    device, offload = "cuda" if on_gpu else "cpu", on_gpu and s.offload
    # Entries of a soft target; the reverse divergence reads the text's own tokens, as hard targets do.
    forward = s.top_logprobs is not None and s.soft is not None and s.soft.divergence == "forward"
    top_k = planner.scores[s.top_logprobs] if forward else 0
    levers = Levers(lora=s.lora, top_k=top_k, offload=offload, freeze=s.freeze, optimizer_states=s.optimizer_states)
    need = estimate(model.config, pack_tokens, shards, how, dtype, device, **levers).total
    stored = bytes_per_element(s.save_dtype) if s.save_dtype else model.width
    made = training(model.config, s)
    whole = size * stored if s.lora is None or s.lora.merged else 0.0
    moments = 8 * made.trained
    if s.optimizer_states != "float32":
        moments = shards * moment_bytes(model.config, shards, s.lora, s.optimizer_states, s.freeze)
    cost = Cost(
        stage.name,
        stage.verb,
        tokens=tokens,
        flops=made.flops(tokens, corpus.context),
        gpus=processes if on_gpu else 0,
        memory=need,
        disk=whole + 4 * made.adapters,
        # What is trained, in float32, and its moments; the newest is whole before the oldest goes, and the best one
        # stays.
        passing=(4 * made.trained + moments) * (s.keep_checkpoints + 1 + (s.validation_data is not None)),
        how=f"{_rows(corpus)}, {steps:,.0f} steps on {processes} process{'es' * (processes > 1)}",
    )
    if offload:
        cost.host = processes * sum(host_memory(model.config, shards, dtype, s.lora, s.freeze))
        cost.how += f", {two(cost.host / 1e9)} GB of the host's memory"
        cost.left_out.append("AdamW's steps of `offload` on the host")
    if on_gpu and planner.gpu is not None:
        if s.dtype == "bfloat16":
            run = cost.flops + recomputed_flops(model.config, tokens, corpus.context, how, made.adapters)
            cost.hours = run / (processes * planner.gpu.flops * planner.assumed.train_mfu) / 3600
            if offload:  # as if none of it ran while the GPU computes
                packs = tokens / (s.pack_tokens * planner.assumed.pack_fill * processes)
                moved = packs * host_copies(model.config, shards, dtype, s.lora, s.freeze)
                copies = moved / planner.assumed.host_link / 3600
                cost.hours += copies
                cost.how += f", {two(copies)} hours of them for copies to and from it"
            shape = s.pack_tokens, model.config.hidden_size, model.config.vocab_size
            loss, products = loss_seconds(*shape, planner.gpu, frozen=made.frozen_head)
            besides = tokens / s.pack_tokens * (loss - products)  # the loss's share that is no FLOPs of the model
            least = (run / planner.gpu.flops + besides) / processes / 3600
            cost.how += f", {two(least)} hours at the GPU's peak"
        else:
            cost.left_out.append(f"in {s.dtype}, whose speed is not known")
        _check_room(cost, planner.gpu)
    else:
        cost.left_out.append(ON_CPU)
    return cost


def merge(planner: Planner, stage: Stage) -> Cost:
    """Return the cost of a `merge` stage."""
    planner.models[stage.settings.out] = model = _merged(planner, stage)
    size = parameters(model.config)
    moved = size * model.width * (1 + len(stage.inputs))
    return Cost(
        stage.name,
        stage.verb,
        hours=moved / planner.assumed.disk_rate / 3600 if planner.gpu is not None else None,
        disk=size * model.width,
        how=f"{len(stage.inputs)} models read, one written, on the CPU",
    )


def length_sweep(planner: Planner, stage: Stage) -> Cost:
    """Return the cost of a `length-sweep` stage."""
    s = stage.settings
    model = _merged(planner, stage)
    if s.target_median_tokens is not None:
        model = model._replace(answer=float(s.target_median_tokens))
        planner.models[str(Path(s.out) / "model")] = model
    sampling = s.generate
    problems, prompt = planner.problems(s.problems, s.limit, model, sampling.chat, s.columns)
    answers = planner.answers(problems * sampling.samples, prompt, min(model.answer, sampling.max_new_tokens))
    cost = Cost(stage.name, stage.verb)
    answering(cost, model, sampling, [answers], planner.gpu, planner.assumed)
    n, size = len(s.weights), parameters(model.config) * model.width
    read = sum(artefact.location in planner.models for artefact in stage.inputs)
    merges = (n + (s.target_median_tokens is not None)) * size * (1 + read) / planner.assumed.disk_rate / 3600
    cost.tokens, cost.flops = n * cost.tokens, n * cost.flops
    if cost.hours is not None:
        cost.hours = merges + n * cost.hours
    kept_models = (s.target_median_tokens is not None) + n * s.keep_models
    cost.disk, cost.passing = kept_models * size, 0 if s.keep_models else size
    more = f", and up to {REFINEMENTS} more to find the length" if s.target_median_tokens is not None else ""
    cost.how = f"{n} weights{more}: {cost.how}"
    if more:
        cost.left_out.append(f"more than {n} weights of a length sweep")
    return cost


def _merged(planner: Planner, stage: Stage) -> Model:
    s = stage.settings
    files = (s.problems, s.generate.chat.template) if stage.verb == "length-sweep" else ()
    models = [planner.model(a.location) for a in stage.inputs if a.location not in files]
    between = math.exp(sum(math.log(max(1.0, model.answer)) for model in models) / len(models))
    return models[0]._replace(answer=between)  # the geometric mean: what a merge in the middle may be hoped to give


def evaluate(planner: Planner, stage: Stage) -> Cost:
    """Return the cost of an `evaluate` stage, and of its judge."""
    s = stage.settings
    model = planner.model(s.model)
    answer = model.answer
    if stage.name == f"evaluate/{BASE}":
        answer = planner.answer_tokens.get(BASE, answer)
    sets = []
    results = {}
    if stage.name in planner.done:
        results = load(EvaluationResults, Path(s.out) / "results.json").benchmarks
    for benchmark in s.benchmarks:
        known = max(benchmark.problems, default=None)
        problems, prompt = planner.problems(benchmark.path, benchmark.limit, model, s.chat, benchmark.columns, known)
        own = s.of(benchmark)
        mean = results[benchmark.name].mean_tokens if results else None
        if mean is None:
            mean = min(answer, own.max_new_tokens)
        sets.append(planner.answers(problems * own.samples, prompt, mean))
        sets[-1].counted = bool(results)
    cost = Cost(stage.name, stage.verb)
    longest = max(s.of(benchmark).max_new_tokens for benchmark in s.benchmarks)
    answering(cost, model, dataclasses.replace(s, max_new_tokens=longest), sets, planner.gpu, planner.assumed)
    cost.disk = 2 * cost.tokens * planner.assumed.text_bytes  # completions, and graded rows
    if s.judge is not None:
        _add(cost, _judging(planner, s.judge, sets))
    return cost


def _judging(planner: Planner, judge: JudgeConfig, sets: Sequence[Corpus]) -> Cost:
    """Return what it costs to ask a judge, as `evaluation.judge` does, about the answers that are assumed wrong."""
    from micota_fast.evaluation.judge import MAX_NEW_TOKENS  # it brings the HTTP client, which no other plan needs

    share, question = planner.assumed.judged, planner.assumed.judge_tokens
    asked = [planner.answers(share * corpus.rows, question, MAX_NEW_TOKENS) for corpus in sets]
    s = GenerateConfig(
        model=judge.model,
        problems="",
        out="",
        url=judge.url,
        api=judge.api,
        openai=judge.openai,
        serve=judge.serve,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    cost = Cost("the judge", "evaluate")
    if judge.api == "openai":  # the shapes of its model are not known
        cost.tokens, cost.how = sum(corpus.tokens for corpus in asked), _written(s, asked)
        cost.left_out.append(AT_A_SERVER)
    else:
        answering(cost, planner.model(judge.model), s, asked, planner.gpu, planner.assumed)
    return cost


def _add(cost: Cost, judge: Cost) -> None:
    """Add a judge, which is served after the answers are written."""
    cost.tokens, cost.flops = cost.tokens + judge.tokens, cost.flops + judge.flops
    if judge.hours is not None:
        cost.hours = (cost.hours or 0) + judge.hours
    cost.gpus, cost.memory = max(cost.gpus, judge.gpus), max(cost.memory, judge.memory)
    cost.too_big = "; ".join(filter(None, (cost.too_big, judge.too_big and f"the judge: {judge.too_big}")))
    cost.left_out += [f"the judge, {why}" for why in judge.left_out]
    cost.how += f"; the judge: {judge.how}"


def align(planner: Planner, stage: Stage) -> Cost:
    """Return the cost of an `align` stage."""
    s = stage.settings
    model, corpora = planner.model(s.model), [planner.corpus(path) for path in s.corpora.values()]
    on_gpu, low = planner.on_gpu(s.device), bytes_per_element(s.dtype)
    # The output matrix is multiplied a second time, by the answers alone, to rank their tokens.
    head = 2 * model.config.hidden_size * model.config.vocab_size
    ranks = sum(corpus.rows * corpus.answer for corpus in corpora) * head
    cost = Cost(
        stage.name,
        stage.verb,
        tokens=sum(corpus.tokens for corpus in corpora),
        flops=sum(train_flops(model.config, corpus.tokens, corpus.context) for corpus in corpora) / 3 + ranks,
        gpus=int(on_gpu),
        memory=low * (parameters(model.config) + s.pack_tokens * kept(model.config, "none"))
        + LOGITS_BYTES["cuda" if on_gpu else "cpu"],
        how=f"{len(corpora)} corpora read once",
    )
    if on_gpu and planner.gpu is not None:
        cost.hours = cost.flops / (planner.gpu.flops * planner.assumed.prefill_mfu) / 3600
        _check_room(cost, planner.gpu)
    else:
        cost.left_out.append(ON_CPU)
    return cost


def _check_room(cost: Cost, gpu: GPU) -> None:
    if cost.memory > FITS * gpu.memory:
        cost.too_big = shortfall(cost.memory, gpu.memory, FITS, KEPT_FREE)


def answering(
    cost: Cost, model: Model, s: SamplingSettings, sets: Sequence[Corpus], gpu: GPU | None, assumed: Assumptions
) -> None:
    """Fill in what it takes to write the answers of `sets`, one set after the other, with servers started once.

    Decoding reads the weights and the KV cache of all running answers once per token (Pope et al., arXiv 2211.05102,
    section 2); the batch is what memory, concurrency and the set allow. At the end of a set one answer runs alone to
    the limit, as greedy answers do that repeat themselves.
    """
    serve, config = s.serve, model.config
    width = model.width if serve.dtype == "auto" else bytes_per_element(serve.dtype)
    weights = parameters(config) * width
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width
    longest = max(corpus.prompt for corpus in sets) + s.max_new_tokens
    cost.tokens = sum(corpus.tokens for corpus in sets)
    cost.flops = sum(train_flops(config, corpus.tokens, corpus.context) for corpus in sets) / 3
    cost.how = _written(s, sets)
    room = _serving(cost, s, weights, longest * kv, gpu, assumed)
    if room is None or gpu is None:
        return
    copies = serve.replicas * serve.dp
    flops, read = gpu.flops * assumed.prefill_mfu * serve.tp, gpu.bandwidth * assumed.decode_bandwidth * serve.tp
    seconds, batches = assumed.startup_s, []
    for corpus in sets:
        context = corpus.prompt + corpus.answer  # of a running answer: long ones run longest
        at_once = s.concurrency / serve.dp if serve.engine == "sglang" else serve.max_running
        batch = max(1.0, min(at_once, corpus.rows / copies, room / (context * kv)))
        step = max((weights + batch * context * kv) / read, batch * train_flops(config, 1, 2 * context) / 3 / flops)
        prefill = train_flops(config, corpus.rows * corpus.prompt, corpus.prompt) / 3 / (copies * flops)
        alone = s.max_new_tokens * (weights + longest * kv / 2) / read
        seconds += prefill + corpus.rows * corpus.answer / (copies * batch) * step + alone
        batches.append(batch)
    cost.hours = seconds / 3600
    cost.how += f", {max(batches):,.0f} at once on each of {copies}" if copies > 1 else f", {max(batches):,.0f} at once"


def _serving(
    cost: Cost,
    s: SamplingSettings | ScoreConfig,
    weights: float,
    most: float,
    gpu: GPU | None,
    assumed: Assumptions,
) -> float | None:
    """Fill in the GPUs and the memory of the servers of a stage.

    Args:
        weights: bytes of the model.
        most: bytes of the KV cache of the longest text.

    Returns:
        Bytes for KV caches on the GPUs of one copy; None: what the servers take is not counted, and `cost` says why.
    """
    serve = s.serve
    if s.url is not None:
        cost.left_out.append(AT_A_SERVER)
        return None
    cost.memory = (weights + most) / serve.tp
    if gpu is None or "cpu" in (sglang.argument(serve, "--device"), serve.device):
        cost.left_out.append(ON_CPU)
        return None
    cost.gpus = serve.replicas * sglang.gpus_needed(serve)
    room = assumed.serve_memory * gpu.memory * serve.tp - weights
    if room < most:
        cost.too_big = shortfall(cost.memory, gpu.memory, assumed.serve_memory, KEPT_BY_SERVERS)
        cost.left_out.append("does not fit")
        return None
    return room


def _written(s: SamplingSettings, sets: Sequence[Corpus]) -> str:
    """How many answers of which length are written, and at which servers that run already."""
    rows, written = sum(c.rows for c in sets), sum(c.rows * c.answer for c in sets)
    counted = "counted" if all(corpus.counted for corpus in sets) else "assumed"
    most = "at most " if getattr(s, "stop_after_accepted", None) is not None and counted == "assumed" else ""
    where = "" if s.url is None else hide_credentials(s.url if isinstance(s.url, str) else " ".join(s.url))
    return f"{most}{rows:,.0f} answers of {two(written / max(1, rows))} tokens ({counted})" + (
        where and f", at {where}"
    )


def _rows(corpus: Corpus) -> str:
    return f"{corpus.rows:,.0f} rows"
