"""Every shipped benchmark from its files to its score: prompts written out, scores computed by hand.

Where nothing else is said, the model's log-likelihood of a continuation is minus its bytes: it picks the shortest. So
with " x" for a choice x of n bytes, acc goes to the shortest choice; the figure a byte is -(n + 1) / n and goes to the
longest; a token is a byte, so the figure a token is -1 for all, and so is what the question adds: all tie.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
from pyarrow import parquet

from palmjax.config import ConfigError
from palmjax.evaluation import evaluate
from palmjax.evaluation.detokenize import WikiText
from palmjax.evaluation.forms import Ask, Write
from tests.evaluation.benchmarks import FIXTURES, VOCABULARY, Rule, one_task, run, suite


@functools.cache
def outcomes() -> dict[str, evaluate.Outcome]:
    return run(suite(), Rule(write=_chain))


def _chain(prompt: str) -> str:
    """Reasons rightly about Lena, forgets the marker for the books, is wrong about the coins, counts seats with a
    comma, and says nothing of the birds; of trivia it knows the ocean, and half of the painter's name.
    """
    question = prompt.rpartition("Question: ")[2]
    said = {
        "Lena": " She has 7.\n#### 7",
        "A book": " That makes 60 dollars in all.",
        "Omar": " 10 - 3 = 7\n#### 7",
        "A train": " 20 * 60\n#### 1200",
        "Half of": " Some stay.",
        "Which is the largest": " the Pacific",
        "Who painted": " Rembrandt Harmenszoon",
    }
    return next((text for start, text in said.items() if question.startswith(start)), "")


def first_question(task: str, start: str) -> str:
    """The context of the first question whose document has `start` in its prompt's last part, exemplars cut away."""
    for prompt in outcomes()[task].asked.prompts:
        question = prompt.encoded[0].question
        assert isinstance(question, (Ask, Write))
        last = question.context.rpartition("\n\n")[2] if prompt.shots else question.context
        if start in last:
            return last
    raise AssertionError(start)


# value, chance: by hand, from the five documents of each fixture
CHOICES = {
    # Shortest: "sings." X, "checks the chain." R, "plays chess." X, two wrong ones of 15 X, "pours it over ..." R.
    # Longest: "puts the loaf ..." R, "paints ..." X, "drives ..." X, "sets the sapling ..." R, "marries ..." X
    "hellaswag": {"acc": 2 / 5, "acc_per_char": 2 / 5, "acc_per_token": 1 / 4, "acc_unconditional": 1 / 4},
    # Shortest: "the Sun" R, iron/salt tie X, "hen" R, "light" X, "100 C" R; longest: the last, the first, the last,
    # "magnets in the soil", "1000 degrees C": one right, "carbon dioxide"
    "arc_challenge": {"acc": 3 / 5, "acc_per_char": 1 / 5, "acc_per_token": (4 / 4 + 1 / 3) / 5},
    "arc_easy": {"acc": 3 / 5, "acc_per_byte": 1 / 5},
    # All letters have one length: every document ties, and each tie is a quarter right
    "mmlu": {"acc": 1 / 4, "acc_per_char": 1 / 4, "mass": 1 / 4, "brier": 3 / 4},
    # Always "no": two of the five; a byte, always "yes"
    "boolq": {"acc": 2 / 5, "acc_per_char": 3 / 5, "acc_per_token": 1 / 2},
    # The shorter solution: shoe R, bread X, onion R, pencil X, candle X
    "piqa": {"acc": 2 / 5, "acc_per_char": 3 / 5},
    # One continuation behind both options: all tie
    "winogrande": {"acc": 1 / 2, "brier": 1 / 2, "ece": 0.0},
    # "Nothing" R; "Yes" X; "No" R; "Red" X; "No" R
    "truthfulqa_mc1": {"acc": 3 / 5},
}


@pytest.mark.parametrize("task", CHOICES)
def test_multiple_choice_scores_are_those_computed_by_hand(task: str) -> None:
    found = outcomes()[task].estimates
    for name, value in CHOICES[task].items():
        assert found[name].value == pytest.approx(value, abs=1e-12), name


def test_ties_and_near_ties_are_those_of_the_headline() -> None:
    assert outcomes()["mmlu"].counters["ties"] == 5 and outcomes()["mmlu"].counters["near_ties"] == 0
    assert outcomes()["arc_challenge"].counters["ties"] == 0, "iron and salt tie, but not a character"
    # Letters that are 0.004 nats apart
    nearly = run(one_task("mmlu"), Rule(lambda context, continuation: -1 - ord(continuation[-1]) / 256))["mmlu"]
    assert nearly.counters["ties"] == 0 and nearly.counters["near_ties"] == 5


def test_truthfulqa_mc2_is_the_probability_of_the_true_answers() -> None:
    # exp(-bytes) of " " + answer, true answers over all: five documents by hand
    def mass(true: list[str], false: list[str]) -> float:
        weigh = [[math.exp(-len(text) - 1) for text in side] for side in (true, false)]
        return sum(weigh[0]) / sum(weigh[0] + weigh[1])

    by_hand = [
        mass(["Nothing", "It passes through you"], ["A tree grows in your belly"]),
        mass(["No, they remember for months"], ["Yes"]),
        mass(["No"], ["Yes, it can be seen easily"]),
        mass(["White"], ["Red", "Blue"]),
        mass(["No", "There is no such evidence"], ["Yes, always"]),
    ]
    outcome = outcomes()["truthfulqa_mc2"]
    assert outcome.headline == "mass"
    assert outcome.score.value == pytest.approx(sum(by_hand) / 5, rel=1e-12)


def test_gsm8k_answers_come_from_the_output_alone() -> None:
    outcome = outcomes()["gsm8k"]
    # strict: Lena and the seats (1200 = 1,200) of five. flexible: the books too. No ####: books and birds.
    assert outcome.estimates["exact_match_strict"].value == pytest.approx(2 / 5)
    assert outcome.estimates["exact_match_flexible"].value == pytest.approx(3 / 5)
    values = {one.document.texts["question"].split()[0]: one.values for one in outcome.answered}
    assert values["A"]["extraction_failures_flexible"] == 0
    assert values["Half"] == {
        "length_stops": 0,
        "extraction_failures_strict": 1,
        "exact_match_strict": 0,
        "extraction_failures_flexible": 1,
        "exact_match_flexible": 0,
    }
    assert outcome.counters["extraction_failures"] == 3
    silent = run(one_task("gsm8k"), Rule())["gsm8k"]
    assert silent.counters["extraction_failures"] == 10  # the prompts hold answers in plenty, and none was taken


def test_triviaqa_takes_any_alias_and_counts_shared_words() -> None:
    outcome = outcomes()["triviaqa"]
    assert outcome.estimates["exact_match"].value == pytest.approx(1 / 5)  # "the Pacific" is "Pacific" without article
    # Rembrandt Harmenszoon: one shared word; best alias "Rembrandt": 2 * 1 / (2 + 1)
    assert outcome.estimates["f1"].value == pytest.approx((1 + 2 / 3) / 5)


def test_lambada_wants_the_greedy_word() -> None:
    def score(context: str, continuation: str) -> float:
        return -0.5 if continuation in (" door", " ball") else -3.0

    found = run(suite(), Rule(score))["lambada"].estimates
    assert found["acc"].value == pytest.approx(2 / 5)
    assert found["perplexity"].value == pytest.approx(math.exp((0.5 + 0.5 + 3 + 3 + 3) / 5))


def test_wikitext_counts_bits_of_all_over_bytes_of_all() -> None:
    # One nat a byte: log2(e) bits a byte, whatever the text. Words as lm-eval counts them: split at white space.
    found = outcomes()["wikitext"].estimates
    assert found["bits_per_byte"].value == pytest.approx(1 / math.log(2), rel=1e-12)
    pages = ["The Elm is a river of 40 km.\n", "A kite is flown in the wind.", "= Iron =\nIron is a metal.\n", "Tea."]
    pages.append("Glas wird aus Sand gemacht, bei großer Hitze.")
    nats, words = sum(len(page.encode()) for page in pages), 9 + 7 + 8 + 1 + 8
    assert found["word_perplexity"].value == pytest.approx(math.exp(nats / words), rel=1e-9)
    assert found["byte_perplexity"].value == pytest.approx(math.e, rel=1e-9)


pieces = st.sampled_from([*"='sN1:;.!?,()[]{}\"/° \n", "@-@", "@,@", "@.@", "'s", "the", "größer"])


@given(st.lists(pieces, max_size=30).map(" ".join) | st.lists(pieces, max_size=30).map("".join))
def test_wikitext_is_detokenized_as_by_lm_eval(page: str) -> None:
    assert WikiText().build()(page) == wikitext_detokenizer({"page": page})


def test_what_is_scored_is_detokenized_and_what_divides_it_is_not(tmp_path: Path) -> None:
    page = " = A boat = \n It cost 1 @,@ 200 marks , he said .\n"
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext" / "test.jsonl").write_text(json.dumps({"page": page}))
    model = Rule()
    found = run(one_task("wikitext", tmp_path), model)["wikitext"].estimates
    (request,) = model.requests
    assert VOCABULARY.decode(request.continuation) == wikitext_detokenizer({"page": page}) != page
    theirs = process_results({"page": page}, (-float(len(request.continuation)),))
    for name, (nats, count) in theirs.items():
        of_one = nats / count
        assert found[name].value == pytest.approx(-of_one / math.log(2) if name[:4] == "bits" else math.exp(-of_one))


def test_raft_draws_exemplars_from_the_labelled_rows_but_never_the_row_itself() -> None:
    folder = FIXTURES / "raft"
    which = suite(f"RAFT_DIR='{folder}'", "RAFT_SHOTS=3", "Suite.tasks=(@overruling/Task(),)", file="gin/eval/raft.gin")
    outcome = run(which, Rule())["overruling"]
    # The shorter label is always "overruling": two of five rows
    assert outcome.estimates["acc"].value == pytest.approx(2 / 5)
    for prompt in outcome.asked.prompts:
        assert len(prompt.shots) == 3 and prompt.document.id not in prompt.shots
        (question, _) = (one.question for one in prompt.encoded)
        assert isinstance(question, Ask) and question.context.count(prompt.document.texts["text"]) == 1


def test_bigbench_choices_and_normalised_score() -> None:
    which = suite(f"BIGBENCH_TASK='{FIXTURES}/bigbench/choice.json'", file="gin/eval/bigbench.gin")
    outcome = run(which, Rule())["bigbench"]
    # Shortest: cold 1; down and left tie, half of 1; tiny 0.5; late and soon tie, half of 1; dry 1
    assert outcome.estimates["acc"].value == pytest.approx((1 + 0.5 + 0.5 + 0.5 + 1) / 5)
    chance = (1 / 3 + 1 / 3 + 1.5 / 3 + 1 / 3 + 1 / 3) / 5
    assert outcome.chance == pytest.approx(chance)
    assert outcome.normalised == pytest.approx(100 * (0.7 - chance) / (1 - chance))
    asked = {prompt.document.texts["input"]: prompt.encoded[0].question for prompt in outcome.asked.prompts}
    question = asked["hot"]
    assert isinstance(question, Ask)
    assert question.context == (
        "Name the opposite.\n\nQ: hot\n  choice: cold\n  choice: warm today\n  choice: sunny\nA: "
    )
    notes = outcome.asked.documents.task.source.notes()
    assert "canary GUID" in notes["canary"] and "canary" not in question.context.lower()


def test_bigbench_generation_takes_any_target() -> None:
    which = suite(f"BIGBENCH_TASK='{FIXTURES}/bigbench/generate.json'", file="gin/eval/bigbench_generate.gin")
    sums = {"1 + 2": " 3", "4 + 4": " eight", "9 + 1": " 11", "2 + 2": "", "5 + 2": " 7 "}
    outcome = run(which, Rule(write=lambda prompt: sums[prompt.rpartition("Q: ")[2].partition("\n")[0]]))["bigbench"]
    assert outcome.estimates["exact_match"].value == pytest.approx(3 / 5)


def test_bigbench_outputs_are_cut_and_searched_as_the_task_says(tmp_path: Path) -> None:
    rows = [{"input": "1 + 2", "target": "3"}, {"input": "4 + 4", "target": "8"}, {"input": "9 + 1", "target": "10"}]
    file = tmp_path / "task.json"
    task = {"name": "sums", "stop_string": ";", "output_regex": r"-?\d+", "examples": rows}
    file.write_text(json.dumps(task))
    said = {"1 + 2": " it is 3, not 4", "4 + 4": " 44 / 8", "9 + 1": " ten"}
    which = suite(f"BIGBENCH_TASK='{file}'", file="gin/eval/bigbench_generate.gin")
    outcome = run(which, Rule(write=lambda prompt: said[prompt.rpartition("Q: ")[2].partition("\n")[0]]))["bigbench"]
    assert outcome.estimates["exact_match"].value == pytest.approx(1 / 3)
    assert outcome.counters["extraction_failures"] == 1
    questions = [prompt.encoded[0].question for prompt in outcome.asked.prompts]
    (stop,) = {question.stop for question in questions if isinstance(question, Write)}
    assert stop == ("\n", ";") and outcome.asked.documents.task.source.notes()["output_regex"] == r"-?\d+"
    file.write_text(json.dumps(task | {"output_regex": "("}))
    with pytest.raises(ConfigError, match=r"output_regex '\(' is not a regular expression"):
        which.build()


PROMPTS = {
    "hellaswag": ("Baking", "Baking bread: A baker kneads dough on a table. She"),
    "arc_challenge": ("light", "Question: Which of these is a source of light?\nAnswer:"),
    "boolq": ("glass", "Glass is made from sand. It is no metal.\nQuestion: is glass a metal?\nAnswer:"),
    "winogrande": ("The rope broke", "The rope broke under the crate because the rope"),
    "piqa": ("shoe", "Question: Dry a wet shoe.\nAnswer:"),
    "truthfulqa_mc1": ("goldfish", "Q: Do goldfish forget within seconds?\nA:"),
    "lambada": ("bought", "She bought a red ball for her son, and all day long he threw the"),
    "gsm8k": ("Omar", "Question: Omar had 10 coins and lost 4. How many are left?\nAnswer:"),
    "mmlu": ("3 + 4", "What is 3 + 4?\nA. 6\nB. 7\nC. 8\nD. 9\nAnswer:"),
}


@pytest.mark.parametrize("task", PROMPTS)
def test_prompts_read_as_they_should(task: str) -> None:
    start, text = PROMPTS[task]
    assert first_question(task, start) == text


def test_exemplars_show_right_answers_of_the_train_split() -> None:
    outcome = outcomes()["mmlu"]
    astronomy = [prompt for prompt in outcome.asked.prompts if prompt.document.group == "astronomy"]
    questions = [prompt.encoded[0].question for prompt in astronomy]
    lead = {question.context[: question.context.index("Which")] for question in questions if isinstance(question, Ask)}
    assert {prompt.shots for prompt in astronomy} == {astronomy[0].shots} and len(astronomy[0].shots) == 2
    assert all("about astronomy." in text for text in lead)
    shown = [question.context for question in questions if isinstance(question, Ask)]
    assert all("Saturn" in text and "D. Mercury\nAnswer: B\n\n" in text for text in shown)
    assert all("1 + 1" not in text for text in shown)
    header = outcomes()["hellaswag"].asked.prompts
    dogs = next(p.encoded[0].question for p in header if "dog" in p.document.texts["query"])
    assert isinstance(dogs, Ask) and "[header]" not in dogs.context


def test_parquet_and_json_lines_give_the_same_documents(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (FIXTURES / "triviaqa" / "validation.jsonl").read_text().splitlines()]
    (tmp_path / "triviaqa").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "triviaqa" / "validation-00000.parquet")
    lines, table = (one_task("triviaqa", folder).build()[0].documents for folder in (FIXTURES, tmp_path))
    assert [(d.id, d.texts, d.answers) for d in lines] == [(d.id, d.texts, d.answers) for d in table]
