"""Contract of every evaluation task.

The same seed gives the same example, which never exceeds the length. The answer key scores 1. So does a solver that
reads only the prompt and is written apart from the generator; the answers of other examples score no more than chance.
"""

import ast
import collections
import itertools
import json
import re

import pytest

from openmimo.data.tokenizer import Tokenizer
from openmimo.evals.task import TASKS, Room, wilson_interval
from openmimo.evals.tasks import _words

LENGTH = 2200
OPTIONS = {"gsm_medium": {"shots": 1}, "gsm_hard": {"shots": 1}}
# The share of pairs of examples with the same answer; small numbers and letters are equal by chance.
GUESSABLE = {"many_shot": 0.35, "math_find": 0.5, "longbench2": 0.5, "gsm_medium": 0.35, "gsm_hard": 0.35,
             "token_multikey": 0.2, "token_tracking": 0.2, "token_two_hop": 0.2, "needle": 0.2, "cwe": 0.2}  # fmt: skip
LANDMARKS = {"Paris": "Eiffel", "Rome": "Colosseum", "Berlin": "Brandenburg", "London": "Big Ben",
             "Athens": "Acropolis", "Barcelona": "Sagrada", "New York": "Liberty", "Agra": "Taj",
             "Istanbul": "Sophia", "Beijing": "Forbidden",
             "Copenhagen": "Mermaid", "Prague": "Charles", "Amsterdam": "Rijks", "Lisbon": "Belem", "Giza": "Sphinx",
             "Cape Town": "Table", "Rio de Janeiro": "Redeemer", "Toronto": "CN", "Brussels": "Atomium",
             "Vienna": "Schönbrunn"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    words = [*_words.NOUNS, *_words.ADJECTIVES, *_words.NAMES, *_words.VERBS, *_words.PLACES]
    return Tokenizer.train([" ".join(words), *words] * 3, 1500)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The options of each task in these tests."""
    rows = [
        {"question": f"Which letter is number {index}?", "context": "word " * 2000, "answer": "ABCD"[index % 4],
         "difficulty": "easy", "length": "short", **{f"choice_{letter}": f"{letter} it is" for letter in "ABCD"}}
        for index in range(12)
    ]  # fmt: skip
    file = tmp_path_factory.mktemp("longbench") / "data.json"
    file.write_text(json.dumps(rows))
    given = OPTIONS | {"longbench2": {"file": str(file)}}
    return lambda name: TASKS.get(name).options(**given.get(name, {}))


def make(name, options, tokenizer, index, *, length=LENGTH, form="base", seed=0):
    return TASKS.get(name).example(options(name), Room(tokenizer, length, form), (seed, length, index))


@pytest.mark.parametrize("name", TASKS.names())
def test_task(name, tokenizer, options):
    task = TASKS.get(name)
    for form in ("base", "chat"):
        room = Room(tokenizer, LENGTH, form)
        example = make(name, options, tokenizer, 0, form=form)
        ids = room.prompt_ids(example)
        assert LENGTH * 0.6 < len(ids) + example.max_tokens <= LENGTH
        assert len(tokenizer.encode(example.answer)) <= example.max_tokens
        assert example.depth is None or 0.0 <= example.depth <= 1.0
        assert task.score(example, example.answer) == 1.0
        for nonsense in ("", "\x00", "nothing at all", "-" * 5000):
            assert task.score(example, nonsense) == 0.0
            assert all(0.0 <= value <= 1.0 for value in task.metrics(example, nonsense).values())
    assert example == make(name, options, tokenizer, 0, form=form)
    if name != "longbench2":  # its prompts are the rows of a file
        assert example != make(name, options, tokenizer, 0, form=form, seed=1)
    assert example != make(name, options, tokenizer, 1, form=form)


@pytest.mark.parametrize("name", TASKS.names())
def test_a_solver_scores_1_and_answers_of_others_are_chance(name, tokenizer, options):
    task = TASKS.get(name)
    examples = [make(name, options, tokenizer, index) for index in range(3)]
    for example in examples:
        text = tokenizer.decode(Room(tokenizer, LENGTH).prompt_ids(example))
        answer = SOLVERS[name](text)
        assert task.score(example, answer) == 1.0, (text[-600:], answer, example.answer)
    pairs = list(itertools.permutations(examples, 2))
    assert sum(task.score(one, other.answer) for one, other in pairs) / len(pairs) <= GUESSABLE.get(name, 0.02)


# --- solvers ----------------------------------------------------------------------------------------------------------


def solve_retrieval(text):
    asked = text.rpartition("secret ")[2]
    keys = re.split(r", | and ", re.search(r"of (.*?) in the text", asked)[1])
    found = re.findall(r"A secret \w+ of (\S+) is: (\S+)\.", text)
    return " ".join(value for key, value in found if key in keys)


def solve_tracking(text):
    asked = re.findall(r"have the value (\d+)", text)[-1]
    names = {asked}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        if source in names:
            names.add(name)
    return " ".join(sorted(names - {asked}))


def solve_common(text):
    words = re.findall(r"\d+\. (\w+)", text.split("most often are:")[1].split("\n\n")[1])
    return " ".join(word for word, _ in collections.Counter(words).most_common(10))


def solve_frequent(text):
    counts = collections.Counter(word for word in text.splitlines()[1].split() if word != "...")
    return " ".join(word for word, _ in counts.most_common(3))


def solve_biography(text):
    text, _, question = text.rpartition("Question: ")
    facts = {}
    for name, teacher in re.findall(r"The teacher of (\w+ \w+) was (\w+ \w+)\.", text):
        facts["teacher", name] = teacher
    for pattern, kind in (("was born in (.+?)\\.", "born"), ("earned a living as a (.+?)\\.", "trade"),
                          ("collected (.+?)s for", "collect"), ("named (.+?)\\.", "ship")):  # fmt: skip
        for name, value in re.findall(rf"(\w+ \w+) [^.]*?{pattern}", text):
            facts[kind, name] = value
    kind = next(kind for kind in ("born", "trade", "collect", "ship") if kind in question)
    name = re.search(r"(?:was|of|did|which) (?:the teacher of )?(\w+ [A-Z][a-z]+)", question)[1]
    return facts[kind, facts["teacher", name] if "the teacher of" in question else name]


def solve_pairs(text):
    objects = json.loads(re.search(r"\{.*\}", text)[0])
    return objects[re.findall(r'Key: "(.*?)"', text)[-1]]


def solve_find(text):
    numbers = sorted(ast.literal_eval(re.search(r"\[.*\]", text)[0]))
    which = re.search(r"Find the (.*?) of", text)[1]
    if which == "median":
        return str(numbers[len(numbers) // 2])
    rank = next((rank for rank, word in ((2, "third"), (1, "second")) if word in which), 0)
    return str(numbers[-1 - rank] if "largest" in which else numbers[rank])


def solve_calculation(text):
    terms = text.splitlines()[-2]
    parts = re.findall(r"[+-] \d+", terms)
    start = int(terms.split()[0])
    steps = itertools.accumulate((int(part.replace(" ", "")) for part in parts), initial=start)
    return ", ".join(map(str, list(steps)[1:]))


def solve_code(text):
    called, argument = re.search(r"does (func_\d+)\((-?\d+)\)", text).groups()
    namespace = {}
    exec("\n".join(line for line in text.splitlines() if line.startswith("def func_")), namespace)
    return str(namespace[called](int(argument)))


def solve_line(text):
    key = re.search(r"In line (\S+),", text)[1]
    return re.search(rf"^line {key}: the register holds <(\d+)>", text, re.MULTILINE)[1]


def solve_many_shot(text):
    *shown, asked = text.split("\n\n")[1:]
    asked = asked.splitlines()[0]
    labels = collections.defaultdict(list)
    for line, label in map(str.splitlines, shown):
        for word in re.findall(r"\w+", line):
            labels[word].append(label.removeprefix("label: "))
    topical = [labels[word] for word in re.findall(r"\w+", asked) if len(set(labels[word])) == 1]
    return max(topical, key=len)[0]


def solve_latent(text):
    landmark = LANDMARKS[re.search(r"has been to (.*?)\?", text)[1]]
    return re.search(rf"(\w+) lives in a flat right across from [^.]*{landmark}", text)[1]


def solve_conversation(text):
    prefix, ordinal, form, subject = re.search(
        r"Begin your answer with (\S+), and then repeat the (\w+) (.+?) about (\w+) word", text
    ).groups()
    drafts = re.findall(rf"User: Write a {form} about {subject}\.\n\nAssistant: (.*?)\n\n", text)
    return prefix + drafts[("first", "second").index(ordinal)]


def solve_symbolic(text):
    values = {}
    statements = re.findall(r"assign (V\d+) = (V?\d+)(?: ([+-]) 1)?\.", text)
    for _ in range(4):  # the variables of the tree
        for name, source, sign in statements:
            start = values.get(source) if source.startswith("V") else int(source)
            if start is not None:
                values[name] = start + {"": 0, "+": 1, "-": -1}[sign]
    asked = int(re.search(r"certainly have the value (-?\d+)", text)[1])
    return ", ".join(name for name, value in values.items() if value == asked)


def solve_word_problem(text):
    """Evaluates the stated formulas; for a reverse problem, tries numbers until the total is the stated one."""
    problem = text.rpartition("Problem: ")[2]
    statements, question = problem.split(" Question: ")
    formulas = dict(re.findall(r"The ((?:average )?number of [^.]*?) equals (.*?)\.", statements))
    total = re.search(r"total number of (.*?) in ([^.?]*?)(?: is (\d+)\.|\?)", question)
    unknown = re.search(r"\. What is the (.*?)\?", question)

    def value(name, known):
        if name in known:
            return known[name]
        formula = formulas[name]
        constant = int(formula.split()[0])
        operands = re.findall(r"the ((?:average )?number of .*?)(?= and the (?:average )?number|$)", formula)
        if not operands:
            return constant
        numbers = [value(operand, known) for operand in operands]
        joined = numbers[0]
        if len(numbers) == 2:
            joined += numbers[1] if "the sum of" in formula else -numbers[1]
        return constant + joined if formula.split()[1] == "plus" else constant * joined

    def whole(known):
        names = [name for name in {*formulas, *known} if name.endswith(f" in {total[2]}")]
        if "newborn" in total[1] or "teachers" in total[1] or "prizes" in total[1]:
            averages = [name for name in names if name.startswith("average")]
            return sum(value(one, known) * value(one.partition(" per ")[2], known) for one in averages)
        return sum(value(one, known) for one in names)

    if unknown is None:
        return f"Answer: {whole({})}."
    return f"Answer: {next(guess for guess in range(1000) if whole({unknown[1]: guess}) == int(total[3]))}."


def solve_tokens(text):
    facts = dict(re.findall(r"@([A-Z])(\w)", text))
    key = text[-1]
    while key in facts:
        key = facts[key]
    return key


SOLVERS = {
    **{name: solve_retrieval for name in TASKS.names() if name.startswith("niah_")},
    **{name: solve_tokens for name in TASKS.names() if name.startswith("token_") or name == "needle"},
    "vt": solve_tracking, "cwe": solve_common, "fwe": solve_frequent, "qa_1": solve_biography, "qa_2": solve_biography,
    "kv_retrieval": solve_pairs, "json_recall": solve_pairs, "math_find": solve_find, "math_calc": solve_calculation,
    "code_run": solve_code, "line_retrieval": solve_line, "many_shot": solve_many_shot, "nolima": solve_latent,
    "mrcr": solve_conversation, "gsm_symbolic": solve_symbolic, "gsm_medium": solve_word_problem,
    "gsm_hard": solve_word_problem,
    "passkey": lambda text: re.search(r"The pass key is (\d+)\.", text)[1],
    "number_string": lambda text: re.search(r"The sequence of digits is (\d+)\.", text)[1],
    "longbench2": lambda text: f" ({'ABCD'[int(re.search(r'number (.*)[?]', text)[1]) % 4]})",
}  # fmt: skip


def test_wilson_interval_contains_the_mean_and_narrows():
    low, high = wilson_interval(0.9, 64)
    assert low < 0.9 < high
    narrower = wilson_interval(0.9, 640)
    assert narrower[1] - narrower[0] < high - low
    assert wilson_interval(1.0, 64)[1] == 1.0
    for examples in range(1, 200):
        for found in range(examples + 1):
            low, high = wilson_interval(found / examples, examples)
            assert 0.0 <= low <= found / examples <= high <= 1.0
