"""A merge from checkpoint to checkpoint: inputs mapped, output written as it is made, OUT whole or absent."""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np

import micota_fast
from micota_fast.chat.end_tokens import GENERATION_CONFIG, end_token_file, shared_end_tokens
from micota_fast.common.dtypes import DTYPES
from micota_fast.common.files import sync_tree, whole_folder, writing
from micota_fast.common.json_io import write_json
from micota_fast.common.lock import locked
from micota_fast.common.safetensors_file import Layout
from micota_fast.config.merge import MergeConfig
from micota_fast.errors import InputError
from micota_fast.merge import tensor_merge
from micota_fast.merge.card import CARD, CONFIG, as_mergekit, card, short_names
from micota_fast.merge.inputs import HEAD, Checkpoint, match
from micota_fast.merge.mergekit import MergePlan, read_mergekit
from micota_fast.merge.output import result_code
from micota_fast.merge.settings import depth_of
from micota_fast.merge.tensor_merge import TensorMerge
from micota_fast.model.folder import COPIED_FILES
from micota_fast.model.hub_upload import require_upload, upload
from micota_fast.model.safetensors_writer import ShardWriter

_AHEAD = 4  # chunks a thread that are prepared and read ahead
_REPORT = "merge.json"
_SWEEP = "weight-"
_WRITTEN = re.compile(
    r"merge\.json|config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    + f"|{re.escape(CARD)}|{re.escape(CONFIG)}"
)


def merge(config: MergeConfig) -> None:
    """Merge as the mergekit file says and write a Hugging Face checkpoint, or one for each of `config.weights`.

    Config and tokenizer are the base's. merge.json in each names the plan, the seed, a fingerprint of each input's
    tensors and the versions. Equal inputs give equal bytes, however they are sharded and whatever the number of threads
    (OMP_NUM_THREADS; else one per core). Memory: some MiB per thread, besides the pages of the inputs.
    A former merge at OUT is replaced; anything else there is left alone and is an error.

    Raises:
        InputError: the file is wrong, `config.push_to_hub` has another form or does not take the result, a checkpoint
            is damaged, the checkpoints differ in their tensors or shapes, or a tensor holds NaN or infinity. Names
            file and tensor.
    """
    require_upload(config.push_to_hub)
    plan = read_mergekit(config.config)
    former = Path(config.out).exists()
    if not config.weights:
        merge_plans({"": plan}, Path(config.out), config.seed)
    else:
        plans = {f"{_SWEEP}{weight:.15g}": plan.with_weight(weight) for weight in config.weights}
        if len(plans) < len(config.weights):
            raise InputError("`weights` contains the same weight twice")
        merge_plans(plans, Path(config.out), config.seed)
    number = f"{len(config.weights)} merges" if config.weights else "merged"
    print(f"{config.out}: {number} by {plan.method}" + (", in place of a former merge" if former else ""), flush=True)
    if config.push_to_hub is not None:
        upload(Path(config.out), config.push_to_hub)


def merge_plans(plans: dict[str, MergePlan], out: Path, seed: int, max_shard_bytes: int = 5_000_000_000) -> None:
    """Merge by plans that differ in weights alone, reading the inputs once; each into its folder of `out`.

    Args:
        plans: by folder; a sole plan's may be "", which is `out` itself.
        max_shard_bytes: weights above it are split into shards.
    """
    out = Path(os.path.abspath(out))  # "." and ".." have no name
    if not out.name:
        raise InputError(f"a merge cannot take the place of {out}; name a folder")
    lock, former = out.with_name(f".{out.name}.lock"), out.with_name(f".{out.name}.former")
    with writing(out), locked(lock, "merge"):
        try:
            _bring_back(former, out)  # of a merge that was killed between the two renames below
            if out.exists() and (foreign := _foreign(out)) is not None:
                raise InputError(f"{foreign} is not of a former merge; remove it or choose another place than {out}")
            try:
                with whole_folder(out) as aside:
                    _write_folders(plans, aside, seed, max_shard_bytes)
                    if out.exists():
                        out.rename(former)
            finally:
                _bring_back(former, out)
        finally:
            lock.unlink()


def _bring_back(former: Path, out: Path) -> None:
    """Give a former merge its name again where no new one has it, and remove it otherwise."""
    if former.exists() and not out.exists():
        former.rename(out)
    shutil.rmtree(former, ignore_errors=True)


def _foreign(out: Path) -> Path | None:
    """Something at `out` that no merge writes; None if it is an empty folder, a merge, or a sweep of them."""
    if not out.is_dir():
        return out
    inside = sorted(out.iterdir())
    if all(path.is_dir() and path.name.startswith(_SWEEP) for path in inside):
        return next((found for path in inside if (found := _foreign_in_merge(path)) is not None), None)
    return _foreign_in_merge(out)


def _foreign_in_merge(folder: Path) -> Path | None:
    inside = sorted(folder.iterdir())
    if all(path.name != _REPORT for path in inside):
        return folder
    return next((path for path in inside if not (path.name in COPIED_FILES or _WRITTEN.fullmatch(path.name))), None)


def _write_folders(plans: dict[str, MergePlan], aside: Path, seed: int, max_shard_bytes: int) -> None:
    folders = [aside / name for name in plans]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        _write(list(plans.values()), folders, seed, max_shard_bytes, stack)
    sync_tree(aside)  # now, so that nothing is waited for while a former merge makes room


def _write(plans: list[MergePlan], folders: list[Path], seed: int, max_shard_bytes: int, stack: ExitStack) -> None:
    plan = plans[0]
    order = [entry.model for entry in plan.inputs]
    order = [plan.base, *order] if plan.spec.starts_at_base else order
    names = dict.fromkeys([plan.base, *order])
    models = {name: stack.enter_context(closing(Checkpoint(name))) for name in names}
    base = models[plan.base]
    matched = match(list(models.values()), plan.one_tokenizer)
    layout = {
        tensor: (sources[0].shape, result_code({source.code for source in sources}, plan.dtype))
        for tensor, sources in matched.items()
    }
    layers = base.config.num_hidden_layers
    for part in plan.filters():
        if not any(part in tensor for tensor in layout):
            print(f"merge: the filter {part!r} fits no tensor's name", file=sys.stderr)
    scalars = {tensor: [each.at(tensor, depth_of(tensor, layers)) for each in plans] for tensor in layout}
    writers = [stack.enter_context(closing(ShardWriter(folder, layout, max_shard_bytes))) for folder in folders]

    def tensors() -> Iterator[TensorMerge]:
        for tensor, (_, code) in layout.items():
            by_name = dict(zip(models, matched[tensor], strict=True))
            sources = [by_name[name] for name in order]
            for source in sources:
                source.read_ahead()
            write = [partial(writer.write, tensor) for writer in writers]
            donor = order.index(plan.base)
            yield TensorMerge(tensor, plan.spec, scalars[tensor], sources, donor, code, seed, write)

    fingerprints = _run(tensors())
    made_of = [_fingerprint(layout, fingerprints, i) for i in range(len(order))]
    end_tokens = _end_tokens([model.folder for model in models.values()])
    for each, folder in zip(plans, folders, strict=True):
        _describe(each, folder, base, layout, seed, dict(zip(order, made_of, strict=True)), models)
        for name, text in end_tokens.items():
            (folder / name).write_text(text, encoding="utf-8")


def _run(tensors: Iterator[TensorMerge]) -> dict[str, list[bytes]]:
    """Take every tensor through its passes, several at once so that no thread waits; fingerprints of their sources."""
    threads = _threads()
    done: SimpleQueue[_Running] = SimpleQueue()  # an entry for each chunk
    fingerprints: dict[str, list[bytes]] = {}
    waiting = 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge")
    try:
        while True:
            while waiting < _AHEAD * threads and (tensor := next(tensors, None)) is not None:
                running = _Running(tensor)
                waiting += running.next_pass(pool, done)
            if not waiting:
                return fingerprints
            running = done.get()
            waiting -= 1
            running.left -= 1
            if running.left == 0:
                started = running.next_pass(pool, done)
                waiting += started
                if not started:
                    fingerprints[running.tensor.name] = running.tensor.fingerprints()
    finally:
        pool.shutdown(cancel_futures=True)


class _Running:
    """A tensor on its way: the pass that it is in, chunk by chunk."""

    def __init__(self, tensor: TensorMerge) -> None:
        self.tensor = tensor
        self.left = 0  # chunks of this pass that are not done
        self._passes = tensor.passes()
        self._chunks: list[Future[Any]] | None = None

    def next_pass(self, pool: Executor, done: "SimpleQueue[_Running]") -> int:
        """Start the next pass with the results of the last; its number of chunks, 0 if there is none.

        Raises what a chunk of the last pass has raised.
        """
        try:
            if self._chunks is None:
                size, work = next(self._passes)
            else:
                size, work = self._passes.send([chunk.result() for chunk in self._chunks])
        except StopIteration:
            return 0
        starts = range(0, size, tensor_merge.CHUNK)
        self.left = len(starts)
        self._chunks = [pool.submit(work, start, min(start + tensor_merge.CHUNK, size)) for start in starts]
        for chunk in self._chunks:
            chunk.add_done_callback(lambda _: done.put(self))
        return self.left


def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else len(os.sched_getaffinity(0))


def _fingerprint(layout: Layout, fingerprints: Mapping[str, list[bytes]], index: int) -> str:
    """Of names and contents of the tensors that were read; neither sharding nor threads play a part."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in layout:
        digest.update(f"{tensor}\0".encode() + fingerprints[tensor][index])
    return digest.hexdigest()


def _describe(
    plan: MergePlan,
    folder: Path,
    base: Checkpoint,
    layout: Layout,
    seed: int,
    fingerprints: Mapping[str, str],
    models: Mapping[str, Checkpoint],
) -> None:
    """Write what goes with the weights: the files of the base, and what says how the merge was made."""
    kinds = {code for _, code in layout.values()}
    dtype = DTYPES[next(iter(kinds))].name if len(kinds) == 1 else None
    content = base.config.to_dict(dtype or base.config.dtype_name or "float32")  # several: as the base says
    if HEAD in layout:
        content["tie_word_embeddings"] = False  # one of the models has a head of its own, so the result has, too
    write_json(folder / "config.json", content, 2)
    for path in (base.folder / name for name in COPIED_FILES):
        if path.is_file():
            try:
                copied = path.read_bytes()
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
            (folder / path.name).write_bytes(copied)
    about = [{"model": models[entry.model].name, "fingerprint": fingerprints[entry.model]} for entry in plan.inputs]
    report = {
        "plan": plan.describe(base.name, about),
        "base_fingerprint": fingerprints[plan.base],
        "seed": seed,
        "versions": {"micota_fast": micota_fast.__version__, "numba": numba.__version__, "numpy": np.__version__},
    }
    write_json(folder / _REPORT, report, 2)
    names = short_names(list(models))
    config = as_mergekit(plan, names, dtype)
    (folder / CONFIG).write_text(config, encoding="utf-8")
    (folder / CARD).write_text(card(plan, names, config), encoding="utf-8")


def _end_tokens(models: list[Path]) -> dict[str, str]:
    """Name and text of a generation_config.json that names every token which ends an answer of one of the models.

    Empty if the base's, the first one's, does, or cannot be told: what no tokenizer belongs to can still be merged.
    """
    base, *others = models
    with_tokenizer = [base, *(model for model in others if (model / "tokenizer.json").is_file())]
    if not (base / "tokenizer.json").is_file():
        return {}
    try:
        ids, notes = shared_end_tokens(with_tokenizer)
        files = end_token_file(base, ids)
    except InputError as error:
        print(f"merge: {GENERATION_CONFIG} is that of {base}, without further end tokens: {error}", file=sys.stderr)
        return {}
    for note in notes:
        print(f"merge: {note}", file=sys.stderr)
    if notes:
        print(f"merge: {GENERATION_CONFIG} names the end tokens {', '.join(map(str, ids))}", file=sys.stderr)
    return files
