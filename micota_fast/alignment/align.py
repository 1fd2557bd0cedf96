"""How close a corpus is to an untrained student: its perplexity and length under the student's own weights.

MiCoTA argues that a corpus teaches more the closer it is to what the student would say (arXiv 2507.01887, its
perplexity analysis). Text is rendered and masked exactly as in training, so what is measured is what is learned.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import micota_fast
from micota_fast.alignment.learnability import distribution, learnability, target_ranks
from micota_fast.alignment.likelihood_profile import overlap, profile, reflection_markers
from micota_fast.alignment.results import Alignment
from micota_fast.chat.encoding import Chat
from micota_fast.common.json_io import parse_json, write_json
from micota_fast.common.schema import to_json
from micota_fast.config.evaluation import AlignConfig
from micota_fast.data.batches import packed_batch
from micota_fast.data.packing import pack
from micota_fast.data.tokenise import Documents, load_documents
from micota_fast.errors import InputError
from micota_fast.kernels import linear_cross_entropy
from micota_fast.model.attention import Backend, PackedAttention, choose_backend
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder
from micota_fast.model.folder import resolve_checkpoint
from micota_fast.model.safetensors_io import load_model
from micota_fast.sources.columns import renamed
from micota_fast.sources.problems import row_id
from micota_fast.sources.rows import read_rows


def run(config: AlignConfig) -> None:
    """Measure each corpus and write OUT/NAME.json, whose keys are described by `alignment.results`.

    Raises:
        InputError: the device does not exist, a model or corpus cannot be read, a row is bad (file:line), or nothing
            is left to measure.
    """
    folder = resolve_checkpoint(config.model)
    chat = Chat.from_checkpoint(folder, config.chat)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("`device`: cuda is asked for and torch sees no CUDA device; choose auto or cpu")
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype)
    backend, why = choose_backend(config.attention, device, dtype, ModelConfig.from_checkpoint(folder).head_dim)
    print(f"align: {config.dtype} on {device}, attention {backend}: {why}")
    model = load_model(folder, dtype, device).eval()
    ends_line_V = np.array(["\n" in chat.decode([i], skip_special_tokens=False) for i in range(chat.vocab_size)])
    own = _answers(config.student_answers, {}) if config.student_answers is not None else None
    for name, path in config.corpora.items():
        columns = config.columns.get(name, {})
        limit = config.max_doc_tokens or config.pack_tokens
        documents = load_documents(path, chat, limit, "drop", columns=columns)
        nll_N, rank_N, counts_D = token_likelihood(model, documents, config.pack_tokens, backend)
        ids_N = documents.input_ids[_has_loss(documents)]
        texts = (chat.decode(ids.tolist()) for ids in np.split(ids_N, np.cumsum(counts_D)[:-1]))
        nll_D = np.add.reduceat(nll_N, np.cumsum(counts_D) - counts_D, dtype=np.float64)
        nll = float(nll_D.sum() / counts_D.sum())
        scored = learnability(nll_N, rank_N, counts_D)
        result = Alignment(
            corpus=name,
            model=folder.name if Path(config.model).is_dir() else config.model,
            documents=len(documents),
            dropped=documents.dropped,
            perplexity=math.exp(nll),
            nll=nll,
            document_nll=distribution(nll_D / counts_D),
            tokens=distribution(counts_D, total=int(counts_D.sum())),
            lengths=tuple(counts_D.tolist()),
            documents_fingerprint=documents.fingerprint,
            learnability=scored,
            **profile(nll_N, counts_D, ends_line_V[ids_N])._asdict(),
            markers=reflection_markers(texts, len(ids_N)),
            own_overlap=overlap(_answers(path, columns), own) if own is not None else None,
            settings={
                "pack_tokens": config.pack_tokens,
                "max_doc_tokens": config.max_doc_tokens,
                "dtype": config.dtype,
                "attention": backend,
            },
            versions={"micota_fast": micota_fast.__version__, "torch": torch.__version__},
        )
        write_json(Path(config.out) / f"{name}.json", to_json(result))
        if own is not None and result.own_overlap is None:
            print(f"WARNING: align: {name}: {config.student_answers} holds no answer to any problem of {path}")
        print(
            f"align: {name}: {scored.nats_per_answer.mean:.1f} nats per answer, perplexity {result.perplexity:.3f} "
            f"over {result.tokens.total} tokens of {result.documents} documents ({result.dropped} above the limit left "
            "out)"
        )


def _answers(path: str, columns: Mapping[str, str]) -> dict[str, list[str]]:
    """Problem id -> answers, of the rows that have both; a corpus of conversations has neither."""
    answers: dict[str, list[str]] = {}
    for where, _, line in read_rows(path):
        row = renamed(parse_json(line, where), columns)
        problem, completion = row_id(row), row.get("completion")
        if problem is not None and isinstance(completion, str):
            answers.setdefault(problem, []).append(completion)
    return answers


def _has_loss(documents: Documents) -> NDArray[np.bool_]:
    """Which tokens are supervised and have something before them, [total]."""
    has_loss = documents.supervised.copy()
    has_loss[documents.offsets[:-1]] = False
    return has_loss


@torch.inference_mode()
def token_likelihood(
    model: Decoder, documents: Documents, pack_tokens: int, backend: Backend
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Compute the negative log-likelihood (nats) and the rank of every supervised token, in file order.

    Documents are packed, so no token is spent on padding; logits exist only chunk by chunk.

    Returns:
        nll [N], rank [N], and the number of supervised tokens of each document [D].
    """
    device = model.lm_head_weight.device
    nll_total = np.zeros(len(documents.input_ids), dtype=np.float32)
    rank_total = np.zeros(len(documents.input_ids), dtype=np.int64)
    order, pack_offsets = pack(documents.lengths, pack_tokens)
    for doc_ids in np.split(order, pack_offsets[1:-1]):
        batch = packed_batch(documents, doc_ids)
        attend = PackedAttention(batch.cu_seqlens, batch.lengths, backend, device)
        hidden_TH = model(batch.input_ids.to(device), batch.position_ids.to(device), attend)
        targets_T = batch.targets.to(device)
        nll_T = linear_cross_entropy(
            hidden_TH, model.lm_head_weight, targets_T, reduction="none", n_supervised=batch.n_supervised
        ).cpu()
        supervised_N = (targets_T >= 0).nonzero()[:, 0]
        rank_T = torch.zeros_like(targets_T)
        rank_T[supervised_N] = target_ranks(hidden_TH[supervised_N], model.lm_head_weight, targets_T[supervised_N])
        rank_T = rank_T.cpu()
        for d, (start, stop) in zip(doc_ids.tolist(), pairwise(batch.cu_seqlens.tolist()), strict=True):
            # The loss at a place is that of the token after it.
            after_first = slice(documents.offsets[d] + 1, documents.offsets[d + 1])
            nll_total[after_first] = nll_T[start : stop - 1]
            rank_total[after_first] = rank_T[start : stop - 1]
    has_loss = _has_loss(documents)
    return nll_total[has_loss], rank_total[has_loss], documents.n_targets
