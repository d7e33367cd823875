"""Prompts: what decides them, where context and continuation part, BOS, and prompts that are too long."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from palmjax.config import ConfigError
from palmjax.data.vocabulary import Bytes, HuggingFace, Vocabulary
from palmjax.evaluation import evaluate
from palmjax.evaluation.documents import Document
from palmjax.evaluation.forms import Ask, Choices, Generate, Rolling
from palmjax.evaluation.prompts import COUNTED, Drawn, Encoder, Prompt, Prompter, Shared
from palmjax.evaluation.records import Records
from palmjax.evaluation.tasks import Suite, Task
from palmjax.evaluation.templates import Style, styles, template
from tests.evaluation.benchmarks import Rule, run, suite

ENCODER = Encoder(Bytes(), 4096)


def write_questions(path: Path, numbers: Sequence[int]) -> str:
    rows = [{"q": f"question {n}?", "c": [f"yes {n}", f"no {n * n}"], "a": n % 2} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(folder: Path, order: Sequence[int], train: Sequence[int] = range(100, 140), seed: int = 7) -> Task:
    return Task(
        name="questions",
        source=Records(
            files=write_questions(folder / "test.jsonl", order),
            train=write_questions(folder / "train.jsonl", train),
            texts={"q": "{q}"},
            choices="c",
            answer="a",
        ),
        form=Choices(context="Q: {q}\nA:"),
        shots=Drawn(count=4, seed=seed),
    )


def hashes(prompts: Sequence[Prompt]) -> dict[str, str]:
    return {prompt.document.id: prompt.hash for prompt in prompts}


def test_a_documents_prompt_depends_on_nothing_but_itself(tmp_path: Path) -> None:
    """1 to 8 ranks, any subset, any order of either file, any limit: the same prompts, exemplars included."""
    everything = list(range(60))
    whole = hashes(questions(tmp_path, everything).read().prompts(ENCODER))
    assert len(whole) == len(set(whole.values())) == 60
    for ranks in range(1, 9):
        parts = [hashes(questions(tmp_path, everything[rank::ranks]).read().prompts(ENCODER)) for rank in range(ranks)]
        assert {key: value for part in parts for key, value in part.items()} == whole, ranks
    backwards = questions(tmp_path, everything[::-1], range(139, 99, -1)).read().prompts(ENCODER)
    assert hashes(backwards) == whole
    tail = hashes(questions(tmp_path, range(30, 60)).read().prompts(ENCODER))
    assert tail == {key: whole[key] for key in tail}
    other = hashes(questions(tmp_path, everything, seed=8).read().prompts(ENCODER))
    assert sum(other[key] == whole[key] for key in whole) <= 1


def test_a_limit_is_part_of_any_larger_one_and_not_the_files_beginning(tmp_path: Path) -> None:
    task = questions(tmp_path, range(60))
    ten, thirty, all_of = ([d.id for d in task.read(limit).documents] for limit in (10, 30, None))
    assert thirty[:10] == ten and all_of[:30] == thirty
    first = {document.id for document in task.read().documents if int(document.where.rpartition(":")[2]) <= 10}
    assert set(ten) != first
    prompts = hashes(task.read().prompts(ENCODER))
    assert hashes(task.read(10).prompts(ENCODER)) == {key: prompts[key] for key in ten}


def test_exemplars_come_from_the_train_split_without_repeats_and_never_the_document(tmp_path: Path) -> None:
    task = questions(tmp_path, range(60), train=range(50, 60))  # the train split is part of the test split
    read = task.read()
    pool = {document.id for document in read.pool}
    for prompt in read.prompts(ENCODER):
        assert len(set(prompt.shots)) == 4 and set(prompt.shots) <= pool and prompt.document.id not in prompt.shots
    shared = Shared(count=4, seed=1).build(read.pool)
    drawn = {tuple(shot.id for shot in shared(d)) for d in read.documents if d.id not in pool}
    assert len(drawn) == 1
    with pytest.raises(ConfigError, match="10 exemplars are wanted, and the train split has 9"):
        Drawn(count=10).build(read.pool)(read.pool[0])


# --- tokens --------------------------------------------------------------------------------------------------------


def tokenizer(tmp_path: Path, texts: Sequence[str], size: int, bos: bool) -> HuggingFace:
    """A byte-level BPE with merges across everything in `texts`; with or without a BOS that it puts first."""
    tokenizers = pytest.importorskip("tokenizers")
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(texts, trainer)
    if bos:
        built.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path / f"tokenizer-{bos}"
    folder.mkdir()
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return HuggingFace.read(folder / "tokenizer.json")


def encode_pair(vocabulary: Vocabulary, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-eval 0.4's rule for decoder-only models: spaces move, the join is split at the context's length."""
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        continuation, context = context[-spaces:] + continuation, context[:-spaces]
    whole, alone = vocabulary.encode(context + continuation), vocabulary.encode(context)
    return alone, whole[len(alone) :]


@hypothesis.given(st.text(max_size=12), st.text(min_size=1, max_size=12))
def test_pairs_are_parted_as_lm_eval_parts_them(context: str, continuation: str) -> None:
    hypothesis.assume(continuation.strip())
    ids, scored, merged = ENCODER.pair(context, continuation)
    alone, rest = encode_pair(Bytes(), context, continuation)
    assert (ids, scored, merged) == ([0, *alone], rest, False)


def test_a_trailing_space_of_the_context_goes_to_the_continuation() -> None:
    assert ENCODER.pair("Answer: ", "New York") == ENCODER.pair("Answer:", " New York")


def test_a_token_that_spans_context_and_continuation_is_scored_and_counted(tmp_path: Path) -> None:
    vocabulary = tokenizer(tmp_path, ["Answer"] * 20, 280, bos=True)
    assert len(vocabulary.encode("Answer")) == 1 and vocabulary.encode("Ans") != vocabulary.encode("Answer")
    ids, scored, merged = Encoder(vocabulary, 64).pair("Ans", "wer")
    assert merged and ids == [vocabulary.bos_id] and scored == vocabulary.encode("Answer")
    form = Choices(context="Ans", continuation="{choice}", unconditional=None)
    document = Document(id="0", where="here:1", texts={}, choices=("wer", "!"), scores=(1.0, 0.0))
    prompt = Prompter(form=form, draw=lambda d: (), encoder=Encoder(vocabulary, 64))(document)
    assert prompt.counts == {"shots_dropped": 0, "truncated": 0, "boundary_merges": 1, "longer_than_a_row": 0}


def test_bos_stands_once_or_where_the_vocabulary_has_none_only_for_an_empty_context(tmp_path: Path) -> None:
    with_bos = tokenizer(tmp_path, ["qz"], 260, bos=True)
    for text in ("some", "<s>some"):  # a chat template writes BOS into the text itself
        ids, _, _ = Encoder(with_bos, 64).pair(text, " text")
        assert ids.count(with_bos.bos_id) == 1 and ids[0] == with_bos.bos_id
        assert Encoder(with_bos, 64).prompt(text).count(with_bos.bos_id) == 1
    without = tokenizer(tmp_path, ["qz"], 260, bos=False)
    assert without.prompt_bos is None
    assert Encoder(without, 64).pair("some", " text")[0] == without.encode("some")
    assert Encoder(without, 64).pair("", "text")[0] == [without.bos_id]
    assert Encoder(without, 64).prompt("") == [without.bos_id]


def test_other_scripts_and_half_characters(tmp_path: Path) -> None:
    ids, scored, _ = ENCODER.pair("Größe: ", "日本語 🎈")
    assert Bytes().decode(ids) == "Größe:" and Bytes().decode(scored) == " 日本語 🎈"
    with pytest.raises(ConfigError, match="surrogate"):
        ENCODER.pair("a", "\ud83d")


def test_a_whole_text_is_scored_once_in_disjoint_windows_behind_bos() -> None:
    text = "a text of some length"
    windows = Encoder(Bytes(), 8).windows(text)
    assert [token for window in windows for token in window.continuation] == Bytes().encode(text)
    assert windows[0].context == (0,) and all(window.read <= 8 for window in windows)
    whole = Bytes().encode(text)
    assert windows[1].context == tuple(whole[7:8])
    assert windows[-1].context == tuple(whole[21 - 9 : 16])  # the last window has all the context that a row holds


# --- too long --------------------------------------------------------------------------------------------------------


def prompter(max_length: int, cut: bool = True, shots: int = 3) -> Prompter:
    pool = [
        Document(id=str(n), where="", texts={"q": f"q{n}"}, choices=("a", "b"), scores=(1.0, 0.0)) for n in range(3)
    ]
    form = Choices(context="{q}?", unconditional=None)
    draw = Drawn(count=shots).build(pool)
    return Prompter(form=form, draw=draw, encoder=Encoder(Bytes(), max_length), separator="\n", cut=cut)


def test_too_long_a_prompt_drops_whole_exemplars_first_then_its_left_and_says_so() -> None:
    document = Document(id="x", where="file:3", texts={"q": "what"}, choices=("yes", "no"), scores=(1.0, 0.0))
    whole = prompter(100)(document)
    assert len(whole.shots) == 3 and not any(whole.counts.values())
    # "q0? a\n" is 6 bytes, "what?" 5, BOS 1, " yes" 4 of which the last is not read: 27 in all
    assert prompter(27)(document).counts == whole.counts
    fewer = prompter(26)(document)
    assert fewer.counts == dict.fromkeys(COUNTED, 0) | {"shots_dropped": 1}
    assert fewer.shots == whole.shots[1:]  # the farthest goes first
    cut = prompter(8)(document)
    assert cut.counts == dict.fromkeys(COUNTED, 0) | {"shots_dropped": 3, "truncated": 1}
    (yes, no) = (one.requests[0] for one in cut.encoded)
    assert yes.context == no.context == (0, *Bytes().encode("hat?"))  # BOS stays, and both choices see the same
    with pytest.raises(ConfigError, match=r"file:3: the prompt has 9 tokens .* a row has 8"):
        prompter(8, cut=False)(document)
    windows = prompter(3)(document)  # " yes" alone is longer
    assert windows.counts == {**cut.counts, "longer_than_a_row": 1}
    mark = Bytes().encode("?")
    yes, no = (one.requests for one in windows.encoded)
    assert [(r.context, r.continuation) for r in yes] == [
        (tuple(mark), tuple(Bytes().encode(" ye"))),
        (tuple(Bytes().encode(" ye")), tuple(Bytes().encode("s"))),
    ]
    assert [(r.context, r.continuation) for r in no] == [((0,), tuple(Bytes().encode(" no")))]
    with pytest.raises(ConfigError, match=r"file:3: the prompt has 9 tokens .* a row has 3"):
        prompter(3, cut=False)(document)


def test_a_generated_text_has_its_room_reserved() -> None:
    form = Generate(context="{q}", target="", max_new_tokens=6)
    document = Document(id="x", where="file:3", texts={"q": "abcdefgh"}, answers=("z",))
    with pytest.raises(ConfigError, match="file:3: 6 tokens follow the context, and a row has 5"):
        Prompter(form=form, draw=lambda d: (), encoder=Encoder(Bytes(), 5))(document)
    prompt = Prompter(form=form, draw=lambda d: (), encoder=Encoder(Bytes(), 10))(document)
    assert prompt.encoded[0].prompt == (0, *Bytes().encode("efgh")) and prompt.counts["truncated"] == 1


def test_a_form_without_exemplars_says_so() -> None:
    with pytest.raises(ConfigError, match="Rolling has no exemplars"):
        Rolling().example(Document(id="x", where="", texts={"text": "t"}))


# --- formats ---------------------------------------------------------------------------------------------------------


def test_styles_change_a_templates_own_words_and_nothing_of_the_document() -> None:
    shout = Style(separator=" -", casing=str.upper, between=" || ", item="({})")
    text = shout.restyle("Question: {question}\nAnswer:")
    assert text == "QUESTION - {question} || ANSWER -"
    assert template(text).fill({"question": "Note: a\nb"}.__getitem__) == "QUESTION - Note: a\nb || ANSWER -"
    assert shout.restyle_option("{letter}. {choice}") == "({letter}) {choice}"
    assert Style().restyle("{{x}} Q: {a!c}\n") == "{{x}} Q: {a!c}\n"
    assert len(styles()) == len(set(styles())) == 8 * 4 * 6 * 6 and styles()[0] == Style()


def test_format_spread_scores_the_task_under_each_format() -> None:
    """A model that knows the answers only where the descriptor ends in a colon and a line ends in one newline."""

    def score(context: str, continuation: str) -> float:
        length = float(len(continuation))
        return -length if context.endswith("Answer:") and "\nAnswer" in context else length

    task = "Suite.tasks=(@arc_easy/Task(),)"
    few, many = (run(suite(task, f"Suite.formats={count}"), Rule(score))["arc_easy"] for count in (4, 12))
    assert len(many.formats) == 12 and many.formats[:4] == few.formats  # the first formats are the same ones
    assert few.formats[0] == run(suite(task), Rule(score))["arc_easy"].score.value
    by_hand = {1 / 5, 3 / 5}  # acc_per_char: the longest is right once, the shortest three times
    assert few.spread is not None and {round(value, 9) for value in many.formats} <= {round(v, 9) for v in by_hand}
    assert len({round(value, 9) for value in many.formats}) == 2
    # A task without words of its own has one format only.
    assert len(run(suite("Suite.tasks=(@winogrande/Task(),)", "Suite.formats=5"), Rule())["winogrande"].formats) == 1


def test_equal_requests_are_asked_once() -> None:
    backend = Rule()
    which: Suite = suite("Suite.tasks=(@mmlu/Task(), @arc_easy/Task())")
    asked = evaluate.ask(which.build(), Encoder(Bytes(), 4096))
    evaluate.answer(asked, backend)
    assert len(backend.requests) == len(set(backend.requests))
    alone = [one for each in asked for p in each.prompts for one in p.encoded if isinstance(one.question, Ask)]
    assert len(alone) > len(backend.requests)
