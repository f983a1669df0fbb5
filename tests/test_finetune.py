"""Fine-tuning: how examples become sequences, what is minimised, that small sets are learnt, what is refused."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gptfast import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gptfast.cli import main
from gptfast.model import Attention
from gptfast.tokenizer import train_tokenizer
from gptfast.training import (
    LOG_FILE,
    STATE_FILE,
    Options,
    Task,
    fine_tune,
    fine_tuning_settings,
    load_fine_tuned,
    load_for_task,
    loop,
    predict,
    read_examples,
)
from gptfast.training.api import objective_for
from gptfast.training.settings import learning_rate
from gptfast.training.tasks import DELIMITER, EXTRACT, START, Examples

QUIET = Options(progress=False, log_every=1)
TASKS = {
    "language-modeling": Task("language-modeling", {}),
    "classification": Task("classification", {}, ("yes", "no", "maybe")),
    "entailment": Task("entailment", {}, ("yes", "no")),
    "similarity": Task("similarity", {}, ("yes", "no")),
    "regression": Task("similarity", {}, regression=True),
    "multiple-choice": Task("multiple-choice", {"choice": ["a", "b"]}, ("a", "b")),
}
ANIMALS = ["cat", "dog", "cow", "pig", "hen", "fox"]
VERBS = ["sees", "hears", "bites", "likes"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny language model in a folder."""
    folder = tmp_path_factory.mktemp("base")
    words = " ".join(f"the {a} {v} no {b} ." for a in ANIMALS for v in VERBS for b in ANIMALS)
    tokenizer = train_tokenizer([words], 120, tokenization="basic")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"n_positions": 24, "n_embd": 48, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
    OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    return folder


def write(path, header, rows):
    path.write_text("\n".join("\t".join(row) for row in [header, *rows]) + "\n")
    return path


def rows_of(kind, n):
    """Lines that can be learnt, and their header."""
    generator = torch.Generator().manual_seed(n)

    def pick(words):
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    def fact():
        return pick(ANIMALS), pick(VERBS), pick(ANIMALS)

    rows = []
    for _ in range(n):
        a, v, b = fact()
        same = pick([True, False])
        end = " ." * (len(rows) % 3)  # so that lengths differ
        text, denied = f"the {a} {v} the {b}{end}", f"the {a} {v} no {b}{end}"
        other = next(x for x in iter(lambda: pick(ANIMALS), None) if x not in (a, b))
        if kind == "language-modeling":
            rows.append((text,))
        elif kind == "classification":
            rows.append((text, {"cat": "yes", "dog": "no"}.get(a, "maybe")))
        elif kind == "entailment":  # does it follow?
            rows.append((text, text if same else denied, "yes" if same else "no"))
        elif kind in ("similarity", "regression"):  # of the same animal?
            label = ("1.0" if same else "-1.0") if kind == "regression" else ("yes" if same else "no")
            two = ANIMALS[:2] if len(rows) % 4 < 2 else ANIMALS[1::-1]
            rows.append((f"the {two[0]} {v}{end}", f"no {two[0] if same else two[1]} {pick(VERBS)}", label))
        else:  # which goes on with the same animal?
            right, wrong = f"the {a} {v}", f"the {other} {v}{end}"
            rows.append((f"the {a}", *((right, wrong) if same else (wrong, right)), "a" if same else "b"))
    columns = [c for names in TASKS[kind].columns.values() for c in names]
    return columns, rows


def load(kind, base, tmp_path, n=24, **dropout):
    file = write(tmp_path / f"{kind}-{n}.tsv", *rows_of(kind, n))
    torch.manual_seed(0)
    model, tokenizer = load_for_task(base, TASKS[kind], **dropout)
    return model, tokenizer, read_examples(file, TASKS[kind], tokenizer, 24)


# -- sequences ------------------------------------------------------------------------------------------------------


def test_sequences_are_the_papers(base, tmp_path):
    _, tokenizer = load_for_task(base, TASKS["classification"])

    def tokens(kind, header, row, max_length=24):
        file = write(tmp_path / "one.tsv", header, [row])
        (example,) = read_examples(file, TASKS[kind], tokenizer, max_length, labelled=False)
        return [" ".join(tokenizer.convert_ids_to_tokens(list(s))).replace("</w>", "") for s in example.sequences]

    s, d, e = START, DELIMITER, EXTRACT
    assert tokens("language-modeling", ["text"], ["the cat"]) == ["the cat"]
    assert tokens("classification", ["text"], ["the cat"]) == [f"{s} the cat {e}"]
    pair = ["the cat", "no dog"]
    assert tokens("entailment", ["premise", "hypothesis"], pair) == [f"{s} the cat {d} no dog {e}"]
    assert tokens("similarity", ["first", "second"], pair) == [
        f"{s} the cat {d} no dog {e}",
        f"{s} no dog {d} the cat {e}",
    ]
    assert tokens("multiple-choice", ["context", "a", "b"], ["the", "cat", "dog"]) == [
        f"{s} the {d} cat {e}",
        f"{s} the {d} dog {e}",
    ]
    assert tokens("classification", ["text"], ["the cat sees the dog"], 5) == [f"{s} the cat sees {e}"]
    assert tokens("entailment", ["premise", "hypothesis"], ["the cat sees the dog", "no dog"], 7) == [
        f"{s} the cat {d} no dog {e}"
    ]


def test_context_is_read_from_several_columns(base, tmp_path):
    task = Task("multiple-choice", {"context": ["story", "question"], "choice": ["a", "b"], "label": ["right"]})
    file = write(tmp_path / "x.tsv", ["right", "b", "a", "question", "story"], [["2", "dog", "cat", "no", "the"]])
    task = task.with_labels_of(file)
    _, tokenizer = load_for_task(base, task)
    (example,) = read_examples(file, task, tokenizer, 24)
    first = " ".join(tokenizer.convert_ids_to_tokens(list(example.sequences[0]))).replace("</w>", "")
    assert first == f"{START} the no {DELIMITER} cat {EXTRACT}"
    assert task.labels == ("1", "2")
    assert example.label == 1


@pytest.mark.parametrize(
    ("columns", "found", "labels"),
    [
        (["a", "b"], ["b", "b"], ("a", "b")),
        (["a", "b"], ["1", "0"], ("0", "1")),
        (["x", "y", "z"], ["3", "1"], ("1", "2", "3")),
        (["x", "y", "z"], ["C", "A", "B"], ("A", "B", "C")),
    ],
)
def test_labels_of_choices(tmp_path, columns, found, labels):
    file = write(tmp_path / "x.tsv", ["label"], [[label] for label in found])
    assert Task("multiple-choice", {"choice": columns}).with_labels_of(file).labels == labels


def test_class_labels_are_in_order_of_their_numbers(tmp_path):
    file = write(tmp_path / "x.tsv", ["label"], [[label] for label in ("10", "9", "9", "x")])
    assert Task("classification", {}).with_labels_of(file).labels == ("9", "10", "x")


def test_tsv_csv_and_json_lines_are_read_alike(base, tmp_path):
    _, tokenizer = load_for_task(base, TASKS["classification"])
    (tmp_path / "x.tsv").write_text("label\ttext\nyes\tthe cat\n\nno\tno dog\n")
    (tmp_path / "x.csv").write_text('\ufefftext,label\n"the\ncat",yes\nno dog,no\n')
    (tmp_path / "x.jsonl").write_text(
        '{"text": "the cat", "label": "yes", "id": 7}\n\n{"text": "no dog", "label": "no"}\n'
    )
    tsv, csv, jsonl = (
        read_examples(tmp_path / f"x.{ending}", TASKS["classification"], tokenizer, 24)
        for ending in ("tsv", "csv", "jsonl")
    )
    assert [e.sequences for e in tsv] == [e.sequences for e in jsonl]
    assert [e.label for e in tsv] == [e.label for e in csv] == [e.label for e in jsonl] == [0, 1]
    assert [e.where.rpartition(":")[2] for e in tsv] == ["2", "4"]
    assert [e.where.rpartition(":")[2] for e in csv] == ["2", "4"]
    assert [e.where.rpartition(":")[2] for e in jsonl] == ["1", "3"]


# -- what is minimised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASKS)
def test_packed_equals_padded(kind, base, tmp_path):
    model, _, examples = load(kind, base, tmp_path, dropout=0.0, attention_dropout=0.0)
    settings = fine_tuning_settings(24, batch_size=24, classifier_dropout=0.0)
    objective = objective_for(model.double(), TASKS[kind], settings).train()
    results = []
    for pack_above in (0.0, 1.0):
        batch = Examples(examples, batch_size=24, pack_above=pack_above).batch(0)
        assert (batch.cu_seqlens is not None) == (pack_above == 0.0)
        objective.zero_grad()
        loss, _, _ = objective(batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in objective.parameters())])
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-10, atol=1e-12)


def test_packing_calls_what_others_put_in_the_model(base, tmp_path):
    """An attention of one's own, hooks on it and on the token table do in a packed batch what they do elsewhere."""
    model, _, examples = load("classification", base, tmp_path, dropout=0.0, attention_dropout=0.0)

    class Louder(Attention):
        def attend(self, qkv, context, layer):
            a, probs = super().attend(qkv, context, layer)
            return 2 * a, probs

        def forward(self, x, context, layer):
            a, probs = super().forward(x, context, layer)
            return a + 1, probs

    body, seen = model.transformer, []
    body.h[0].attn.__class__ = Louder
    body.h[1].attn.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    body.tokens_embed.register_forward_hook(lambda module, inputs, output: 3 * output)
    objective = objective_for(model.double(), TASKS["classification"], fine_tuning_settings(24, batch_size=24)).eval()
    packed, padded = (objective(Examples(examples, batch_size=24, pack_above=p).batch(0)) for p in (0.0, 1.0))
    torch.testing.assert_close(packed, padded, rtol=1e-10, atol=1e-12)
    assert seen == [Attention, Attention]


@pytest.mark.parametrize("kind", ["classification", "multiple-choice", "regression", "language-modeling"])
@pytest.mark.parametrize("pack_above", [0.0, 1.0])
def test_loss_is_that_of_the_heads_own_forward(kind, pack_above, base, tmp_path):
    """Example by example through HuggingFace's interface, with λ = 0.5 of the mean over all tokens."""
    model, _, examples = load(kind, base, tmp_path, n=6, dropout=0.0, attention_dropout=0.0)
    model.eval()
    settings = fine_tuning_settings(6, batch_size=6, classifier_dropout=0.0)
    objective = objective_for(model, TASKS[kind], settings).eval()
    loss, lm_loss, _ = objective(Examples(examples, batch_size=6, pack_above=pack_above).in_order()[0])

    nll, tokens, task_losses = 0.0, 0, []
    for example in examples:
        ids = [torch.tensor([s]) for s in example.sequences]
        for x in ids:
            states = model.transformer(x).last_hidden_state
            logits = F.linear(states[:, :-1], model.transformer.tokens_embed.weight)
            nll += F.cross_entropy(logits[0], x[0, 1:], reduction="sum")
            tokens += x.shape[1] - 1
        label = torch.tensor([example.label]) if example.label is not None else None
        if kind == "classification":
            task_losses.append(model(ids[0], labels=label).loss)
        elif kind == "regression":
            task_losses.append((sum(model(x).logits for x in ids)[0, 0] - example.label) ** 2)
        elif kind == "multiple-choice":
            T = max(x.shape[1] for x in ids)
            rows = torch.cat([F.pad(x, (0, T - x.shape[1])) for x in ids])[None]
            last = torch.tensor([[x.shape[1] - 1 for x in ids]])
            task_losses.append(model(rows, mc_token_ids=last, mc_labels=label).mc_loss)
    torch.testing.assert_close(lm_loss, nll / tokens, rtol=1e-5, atol=1e-6)
    expected = torch.stack(task_losses).mean() + 0.5 * nll / tokens if task_losses else nll / tokens
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_parts_of_a_step_add_up(base, tmp_path):
    model, _, examples = load("similarity", base, tmp_path, n=10)
    objective = objective_for(model, TASKS["similarity"], fine_tuning_settings(10, batch_size=10)).eval()
    data = Examples(examples, batch_size=10)
    whole = objective(data.batch(0))[0]
    parts = [objective(data.batch(0, part, 3))[0] for part in range(3)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_no_gradient(base, tmp_path):
    model, _, examples = load("classification", base, tmp_path)
    objective = objective_for(model, TASKS["classification"], fine_tuning_settings(24, batch_size=24)).train()
    batch, gradients = Examples(examples, batch_size=24).batch(0), []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        torch.manual_seed(1)
        objective.zero_grad()
        objective(batch)[0].backward()
        gradients.append([p.grad.clone() for p in objective.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_paper_settings():
    settings = fine_tuning_settings(1497)
    assert settings.steps == 138
    assert (settings.learning_rate, settings.batch_size, settings.clip_norm) == (6.25e-5, 32, 1.0)
    assert (settings.weight_decay, settings.beta1, settings.beta2) == (0.01, 0.9, 0.999)
    assert (settings.lm_coef, settings.classifier_dropout) == (0.5, 0.1)
    rates = [learning_rate(step, fine_tuning_settings(32_000)) / 6.25e-5 for step in range(3000)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert rates[6 + 1497] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3


def test_epochs_take_each_example_once(base, tmp_path):
    _, _, examples = load("classification", base, tmp_path, n=11)
    data = Examples(examples, batch_size=3, seed=4)
    epochs = [[data.batch(3 * e + i).source.split(", ") for i in range(3)] for e in range(2)]
    for epoch in epochs:
        assert len({where for batch in epoch for where in batch}) == 9
    assert epochs[0] != epochs[1]


# -- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "metric", "enough"),
    [
        ("classification", "held_out_accuracy", 0.95),
        ("entailment", "held_out_accuracy", 0.95),
        ("similarity", "held_out_accuracy", 0.9),
        ("regression", "held_out_correlation", 0.9),
        ("multiple-choice", "held_out_accuracy", 0.8),
    ],
)
def test_learns_and_predicts_from_its_folder_alone(kind, metric, enough, base, tmp_path):
    model, tokenizer, examples = load(kind, base, tmp_path, n=320, dropout=0.0, attention_dropout=0.0)
    held_out = read_examples(write(tmp_path / "held.tsv", *rows_of(kind, 60)), TASKS[kind], tokenizer, 24)
    settings = fine_tuning_settings(320, epochs=8, learning_rate=3e-3, context=24)
    folder = tmp_path / "out"
    _, results = fine_tune(model, tokenizer, TASKS[kind], examples, settings, folder, held_out=held_out, options=QUIET)
    assert results[metric] >= enough

    loaded, tokenizer, task = load_fine_tuned(folder)
    assert task == TASKS[kind]
    again = read_examples(tmp_path / "held.tsv", task, tokenizer, 24)
    rows = list(predict(loaded, task, again, batch_size=7))
    assert len(rows) == 60
    if kind == "regression":
        values = torch.tensor([[row["value"], e.label] for row, e in zip(rows, again, strict=True)])
        assert float(torch.corrcoef(values.T)[0, 1]) == pytest.approx(results[metric], abs=1e-4)
        return
    right = [row["label"] == task.labels[e.label] for row, e in zip(rows, again, strict=True)]
    assert sum(right) / 60 == pytest.approx(results[metric])
    for row in rows:
        assert list(row["probabilities"]) == list(task.labels)
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert max(row["probabilities"], key=row["probabilities"].get) == row["label"]


def test_transformers_reads_what_is_left(base, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference")
    model, tokenizer, examples = load("classification", base, tmp_path)
    settings = fine_tuning_settings(24, epochs=1, batch_size=8, context=24)
    fine_tune(model, tokenizer, TASKS["classification"], examples, settings, tmp_path / "out", options=QUIET)
    theirs = transformers.OpenAIGPTForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.id2label == {0: "yes", 1: "no", 2: "maybe"}
    sequences = [e.sequences[0] for e in examples]
    T = max(map(len, sequences))
    ids = torch.tensor([[*s, *[theirs.config.pad_token_id] * (T - len(s))] for s in sequences])
    with torch.no_grad():
        probabilities = theirs(ids).logits.softmax(-1)
    loaded, _, task = load_fine_tuned(tmp_path / "out")
    ours = [list(row["probabilities"].values()) for row in predict(loaded, task, examples)]
    torch.testing.assert_close(torch.tensor(ours), probabilities, rtol=1e-4, atol=1e-5)


def test_stopped_and_resumed_equals_uninterrupted(base, tmp_path, monkeypatch):
    """Examples' order, dropout, packing, accumulation."""
    settings = fine_tuning_settings(24, epochs=3, batch_size=8, context=24, accumulate=2)

    def run(folder, resume=False):
        model, tokenizer, examples = load("multiple-choice", base, tmp_path)
        options = Options(progress=False, log_every=1, resume=resume)
        task = TASKS["multiple-choice"]
        return fine_tune(model, tokenizer, task, examples, settings, tmp_path / folder, options=options)[0]

    whole = run("whole")
    monkeypatch.setattr(loop, "learning_rate", _stopping_at(4, loop.learning_rate))
    with pytest.raises(KeyboardInterrupt, match="after step 5"):
        run("parts")
    monkeypatch.undo()
    resumed = run("parts", resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    losses = [
        [json.loads(row)["loss"] for row in (tmp_path / name / LOG_FILE).read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert len(losses[0]) == 9
    assert losses[0] == losses[1]


def _stopping_at(at, rate):
    def learning_rate(step, settings):
        if step == at:
            loop.signal.raise_signal(loop.signal.SIGINT)
        return rate(step, settings)

    return learning_rate


# -- the command line -----------------------------------------------------------------------------------------------


def test_train_then_predict(base, tmp_path, capsys):
    train_file = write(tmp_path / "train.tsv", *rows_of("classification", 64))
    valid_file = write(tmp_path / "valid.tsv", *rows_of("classification", 20))
    folder = tmp_path / "out"
    command = ["train", str(train_file), "--task", "classification", "--model", str(base), "--output", str(folder)]
    command += ["--valid", str(valid_file), "--epochs", "2", "--batch-size", "16", "--json"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    row = json.loads(out)
    assert row["steps"] == 8
    assert row["held_out_loss"] > 0
    assert "64 examples (0 cut to 24 tokens), 8 steps" in err
    assert (folder / "loss.svg").exists()
    log = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    assert log[-1]["tokens_per_second"] > 0
    assert 0 < log[-1]["mfu"] < 1
    assert [row["step"] for row in log if "held_out_accuracy" in row] == [4, 8]  # an epoch each

    unlabelled = tmp_path / "new.jsonl"
    unlabelled.write_text('{"text": "the cat"}\n{"text": "no dog"}\n')
    assert main(["predict", str(unlabelled), "--model", str(folder)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    assert all(set(row["probabilities"]) == {"yes", "no", "maybe"} for row in rows)
    assert main(["predict", str(unlabelled), "--model", str(folder), "--output", str(tmp_path / "p.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\tlabel\nthe cat\tyes\nthe dog\n", r"bad\.tsv:3 has 1 fields, the first line has 2"),
        ("text\tlabel\nthe cat\tperhaps\n", r"bad\.tsv:2: label must be one of yes, no, maybe, got 'perhaps'"),
        ("text\tlabel\n \tyes\n", r"bad\.tsv:2: text must hold some text, got \[' '\]"),
        ("words\tlabel\nthe cat\tyes\n", r"bad\.tsv:1 has no column 'text', it has 'words', 'label'"),
        ("text\tlabel\n", r"bad\.tsv holds no examples"),
        ("", r"bad\.tsv holds no examples"),
        ("text\tlabel\ttext\nthe cat\tyes\tno\n", r"bad\.tsv:1 has column 'text' twice"),
    ],
)
def test_bad_lines_are_named(text, message, base, tmp_path):
    _, tokenizer = load_for_task(base, TASKS["classification"])
    (tmp_path / "bad.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "bad.tsv", TASKS["classification"], tokenizer, 24)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"first": "a", "second": "b", "label": 1}\n{"first"\n', r"bad\.jsonl:2 is not JSON"),
        ("bad.jsonl", b'["a", "b"]\n', r"bad\.jsonl:1 must be a JSON object, got list"),
        ("bad.jsonl", b'{"first": "the", "second": ["b"], "label": 1}\n', r"bad\.jsonl:1: second must be a text or a"),
        ("bad.jsonl", b'{"first": "the", "label": 1}\n', r"bad\.jsonl:1 has no column 'second'"),
        ("bad.csv", b'first,second,label\n"the,no,1\n', r"bad\.csv:2: unexpected end of data"),
        ("bad.csv", b"first,second,label\nthe,no,many\n", r"bad\.csv:2: label must be a number, got 'many'"),
        ("bad.csv", b"first,second,label\nthe,no,nan\n", r"bad\.csv:2: label must be a finite number, got 'nan'"),
        ("bad.csv", "first,second,label\nthe,no,1\nthé,no,1\n".encode("latin-1"), r"bad\.csv:3 is not UTF-8 text"),
        ("bad.jsonl", b"\n" + b"9" * 5000, r"bad\.jsonl:2 is not JSON"),
        ("bad.jsonl", b"[" * 100_000, r"bad\.jsonl:1 is not JSON"),
        ("bad.jsonl", b'{"first": "a\\ud800", "second": "b", "label": 1}\n', r"bad\.jsonl:1: first is not text"),
        ("bad.txt", b"", r"bad\.txt must end in one of \.tsv, \.csv, \.jsonl, \.ndjson, got '\.txt'"),
    ],
)
def test_bad_files_are_named(name, content, message, base, tmp_path):
    _, tokenizer = load_for_task(base, TASKS["regression"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name, TASKS["regression"], tokenizer, 24)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (("summary", {}), "kind must be one of language-modeling, .*, got 'summary'"),
        (("entailment", {"text": ["x"]}), "columns of entailment must be of premise, hypothesis, label, got 'text'"),
        (("multiple-choice", {}), "choice must be at least two columns, got choice"),
        (("multiple-choice", {"choice": ["a", "b"]}, ("x", "y", "z")), "labels must name 2 choices, got x, y, z"),
        (("classification", {}, ("x", "x")), "labels must be at least two that differ, got x, x"),
        (("classification", {"label": ["x", "y"]}), "label must be one column, got x, y"),
        (("multiple-choice", {"choice": ["a", "b"]}, (), True), "regression goes with a number to predict"),
    ],
)
def test_bad_tasks(task, message):
    with pytest.raises(ValueError, match=message):
        Task(*task)


def test_labels_that_cannot_be(tmp_path):
    file = write(tmp_path / "x.tsv", ["label"], [["a"], ["a"]])
    with pytest.raises(ValueError, match=r"x\.tsv: label must hold at least two labels, got a"):
        Task("classification", {}).with_labels_of(file)
    with pytest.raises(ValueError, match=r"x\.tsv: label must tell 2 choices apart, got a"):
        Task("multiple-choice", {"choice": ["x", "y"]}).with_labels_of(file)
    file = write(tmp_path / "y.tsv", ["text", "label"], [["a", "yes"], ["b", "no"], ["c", " "]])
    with pytest.raises(ValueError, match=r"y\.tsv:4: label is empty"):
        Task("classification", {}).with_labels_of(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "classification", "--columns", "text"], "--columns must be ROLE=COLUMN, got 'text'"),
        (["--task", "classification", "--steps", "3"], "--steps goes with plain text; --task has --epochs"),
        (["--task", "classification", "--batch-size", "65"], "batch_size must be from 1 to the number of examples, 64"),
        (["--task", "classification", "--context", "25"], "context must be at most n_positions = 24, got 25"),
        (["--task", "classification", "--accumulate", "64"], "batch_size must be at least ranks * accumulate = 64"),
        (["--task", "classification", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--task", "classification", "--cuda-graph"], "cuda_graph needs one GPU and accumulate = 1"),
        (["--task", "classification", "--parallel", "ddp"], "parallel='ddp' needs torchrun"),
        (["--task", "classification", "--context", "2"], "a sequence of classification has at least 3 tokens, got 2"),
        (["--task", "classification", "--dropout", "1.5"], "dropout must be in [0, 1), got 1.5"),
        (["--epochs", "3"], "--epochs goes with --task"),
        (["--regression"], "--regression goes with --task"),
        (["--padded"], "--padded goes with --task"),
        ([], "--steps is needed to train on plain text"),
    ],
)
def test_bad_arguments(arguments, message, base, tmp_path, capsys):
    file = write(tmp_path / "train.tsv", *rows_of("classification", 64))
    assert main(["train", str(file), "--model", str(base), "--output", str(tmp_path / "x"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "x").glob(STATE_FILE))


@pytest.mark.parametrize(("kind", "least"), [("language-modeling", 2), ("classification", 3), ("similarity", 5)])
def test_shortest_sequences(kind, least, base, tmp_path):
    _, tokenizer = load_for_task(base, TASKS[kind])
    file = write(tmp_path / "x.tsv", *rows_of(kind, 6))
    assert {len(s) for e in read_examples(file, TASKS[kind], tokenizer, least) for s in e.sequences} == {least}
    with pytest.raises(ValueError, match=f"max_length must be at least {least}: a sequence of {kind}"):
        read_examples(file, TASKS[kind], tokenizer, least - 1)


def test_a_text_of_one_token_predicts_nothing(base, tmp_path):
    _, tokenizer = load_for_task(base, TASKS["language-modeling"])
    file = write(tmp_path / "x.tsv", ["text"], [["the cat"], ["cat"]])
    with pytest.raises(ValueError, match=r"x\.tsv:3: text must hold at least two tokens, got \['cat'\]"):
        read_examples(file, TASKS["language-modeling"], tokenizer, 24)


def test_examples_longer_than_the_model_are_refused(base, tmp_path):
    model, tokenizer, examples = load("classification", base, tmp_path)
    long = dataclasses.replace(examples[3], sequences=(examples[3].sequences[0] * 5,))
    settings = fine_tuning_settings(24, batch_size=8, context=24)
    with pytest.raises(ValueError, match=r"classification-24\.tsv:5 has \d+ tokens, context is 24"):
        fine_tune(model, tokenizer, TASKS["classification"], [*examples[:3], long, *examples[4:]], settings, tmp_path)


def test_resume_packed_differently_is_refused(base, tmp_path, monkeypatch):
    model, tokenizer, examples = load("classification", base, tmp_path)
    settings = fine_tuning_settings(24, batch_size=8, context=24)
    run = functools.partial(fine_tune, model, tokenizer, TASKS["classification"], examples, settings, tmp_path / "x")
    monkeypatch.setattr(loop, "learning_rate", _stopping_at(4, loop.learning_rate))
    with pytest.raises(KeyboardInterrupt, match="after step 5"):
        run(options=QUIET)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"other settings: \{'pack_above': 0.2\}, now \{'pack_above': 1.0\}"):
        run(options=dataclasses.replace(QUIET, resume=True), packed=False)


def test_classifier_dropout_is_every_heads(base):
    for kind in ("classification", "multiple-choice"):
        model, _ = load_for_task(base, TASKS[kind], dropout=0.0)
        states = torch.ones(50, 2, 48)
        for p, differ in ((0.0, False), (0.5, True)):
            settings = fine_tuning_settings(24, batch_size=24, classifier_dropout=p)
            logits = objective_for(model, TASKS[kind], settings).train().task_logits(states)
            assert (len(logits[:, 0].unique()) > 1) == differ


def test_predict_reads_before_it_writes_and_as_far_as_training_did(base, tmp_path, capsys):
    train_file = write(tmp_path / "train.tsv", *rows_of("classification", 32))
    command = ["train", str(train_file), "--task", "classification", "--model", str(base)]
    command += ["--output", str(tmp_path / "out"), "--epochs", "1", "--context", "5", "--json"]
    assert main(command) == 0
    capsys.readouterr()

    predicting = ["predict", str(tmp_path / "x.jsonl"), "--model", str(tmp_path / "out")]
    (tmp_path / "x.jsonl").write_text('{"text": "the cat sees"}\n{"text": "the cat sees the dog likes no pig ."}\n')
    assert main(predicting) == 0
    short, long = capsys.readouterr().out.splitlines()
    assert short == long  # both cut to five tokens

    (tmp_path / "p.jsonl").write_text("precious")
    for arguments, message in (
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--device", "cuda:99"], "--device cuda:99: this PyTorch sees"),
        ([], "x.jsonl:2: text must hold some text"),
    ):
        if not arguments:
            (tmp_path / "x.jsonl").write_text('{"text": "the cat"}\n{"text": " "}\n')
        assert main([*predicting, "--output", str(tmp_path / "p.jsonl"), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert (tmp_path / "p.jsonl").read_text() == "precious"


def test_predict_needs_a_fine_tuned_model(base, tmp_path, capsys):
    file = write(tmp_path / "x.tsv", ["text"], [["the cat"]])
    assert main(["predict", str(file), "--model", str(base)]) == 2
    assert "has no task.json: it is no fine-tuned model" in capsys.readouterr().err
    (tmp_path / "task.json").write_text('{"kind": "classification"}')
    assert main(["predict", str(file), "--model", str(tmp_path)]) == 2
    assert "task.json is damaged" in capsys.readouterr().err


def test_nan_names_the_batch(base, tmp_path):
    model, tokenizer, examples = load("classification", base, tmp_path)
    token = examples[5].sequences[0][2]
    model.transformer.tokens_embed.weight.data[token] = torch.inf
    settings = fine_tuning_settings(24, batch_size=24, context=24)
    with pytest.raises(FloatingPointError, match=r"step 0: loss nan, .* on .*classification-24\.tsv:7"):
        fine_tune(model, tokenizer, TASKS["classification"], examples, settings, tmp_path / "x", options=QUIET)
    assert not (Path(tmp_path) / "x" / "model.safetensors").exists()
