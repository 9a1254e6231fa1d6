"""Documents: they ask what inference asks, answer what it reads, and are as long as they were measured to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from reasonedit.reasonedit_core.dialogue.answers import say_consistency, say_pair, say_verdict
from reasonedit.reasonedit_core.dialogue.pack import Part
from reasonedit.reasonedit_core.dialogue.replies import parse_consistency, parse_description, parse_thought, parse_verdict
from reasonedit.reasonedit_core.errors import DataError
from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.mllm import decode
from reasonedit.reasonedit_core.mllm.constrain import Reply, Vocabulary
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.vision import prepare
from reasonedit.reasonedit_core.packing import IGNORED
from reasonedit.reasonedit_core.reasoners.reasoner import PackReasoner
from reasonedit.reasonedit_core.types import Decision
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.tests.voices import VARIANTS, drawn_records, make_voice
from reasonedit.training.data import transcripts
from reasonedit.training.data.documents import TASKS, USUAL, Documents, reflect_replies
from reasonedit.training.data.lengths import Lengths
from reasonedit.training.data.records import Edit, Record, Turn
from reasonedit.training.data.transcripts import Shown, segments, shown_size


@pytest.fixture(scope="module")
def records():
    return drawn_records()


@pytest.fixture(scope="module")
def documents():
    return Documents(make_voice("qwen-edit-plus"))


def first(records, kind):
    return next(record for record in records if record.kind == kind)


def learnt(documents, document):
    return documents.voice.mllm.tokenizer.decode(document.ids[document.labels != IGNORED])


def changed(record: Record, **values) -> Record:
    """A copy of a record with other values in some of its parts, unchecked."""
    return record.model_copy(update=values)


# ---- questions -----------------------------------------------------------------------------------------------------------


class Spy:
    """Prepares every query as the speaker in process does, keeps the ids and positions, and answers by a script."""

    def __init__(self, mllm, shown, replies):
        self.mllm, self.shown, self.replies = mllm, shown, replies
        self.seen = {}

    def answer(self, queries, **_):
        for query in queries:
            ids = []
            embed = self.mllm.embed
            self.mllm.embed = lambda tokens, features, embed=embed, ids=ids: (ids.extend(tokens), embed(tokens, features))[1]
            try:
                shown = self.shown
                row = decode._prepare(self.mllm, 0, query, (shown.min_pixels, shown.max_pixels), shown.max_side, shown.snap)
            finally:
                self.mllm.embed = embed
            self.seen[query.task] = (ids, row.positions[:, 0], len(row.reply.opening))
        return [self.replies[query.task] for query in queries]


@pytest.mark.parametrize("paired", [False, True])
def test_documents_ask_what_inference_asks(records, paired):
    """Token by token and position by position, up to and with what the decoder forces at the head of the reply."""
    mllm = load_mllm(tiny_checkpoint("qwen-edit-plus", std=0.2) / "text_encoder", dtype=torch.float32)
    voice = make_voice("qwen-edit-plus", mllm=mllm, paired=paired, shown=Shown(4 * 784, 9 * 784, 112))
    documents = Documents(voice)
    think, reflect = first(records, "think"), first(records, "reflect")
    replies = {"think": "Paint it.", "describe": "Shapes.", **reflect_replies(reflect)}
    spy = Spy(mllm, voice.shown, replies)
    reasoner = PackReasoner(voice.pack, spy, paired=paired)
    reasoner.think(documents.open(think, "input"), think.instruction.raw)
    goal, raw = reflect.editor_instruction, reflect.instruction.raw
    reasoner.describe(documents.open(reflect, "input"), goal, original=raw)
    pictures = [documents.open(reflect, name) for name in ("input", "generated")]
    reasoner.reflect(*pictures, goal, reflect.reflect.target_description, original=raw)
    for task, record in (("think", think), ("describe", reflect), ("score", reflect), ("reflect", reflect)):
        document = documents.text(record, task)
        ids, positions, forced = spy.seen[task]
        assert document.ids[: len(ids)].tolist() == ids, task
        assert torch.equal(document.positions[:, : len(ids)], positions), task
        n_prompt = len(ids) - forced
        assert bool((document.labels[:n_prompt] == IGNORED).all()) and bool((document.labels[n_prompt:] != IGNORED).all())


def test_the_verdict_is_asked_with_the_score_that_its_answer_gives(documents, records):
    record = first(records, "reflect")
    text = documents.voice.mllm.tokenizer.decode(documents.text(record, "reflect").ids)
    found = parse_consistency(reflect_replies(record)["score"])
    assert f"gave it {found.score} points out of 10, saying: {found.reason}" in text
    assert record.instruction.raw in text and record.editor_instruction in text


def test_the_users_words_stand_beside_what_the_editor_was_told(documents, records):
    record = first(records, "reflect")
    told = changed(record, edit=Edit(instruction_used="Colour the disc crimson."))
    assert told.editor_instruction == "Colour the disc crimson." != told.instruction.raw
    for task in ("describe", "score", "reflect"):
        text = documents.voice.mllm.tokenizer.decode(documents.text(told, task).ids)
        assert f"<request>\n{told.instruction.raw}\n</request>" in text and "Colour the disc crimson." in text


def test_chinese_instructions_are_asked_in_chinese(documents, records):
    record = first(records, "think")
    chinese = changed(
        record,
        instruction=record.instruction.model_copy(update={"raw": "让这个形状变成红色"}),
        think=record.think.model_copy(update={"steps": ("把圆形涂成红色。",), "text": None}),
    )
    document = documents.text(chinese, "think")
    assert "让这个形状变成红色" in documents.voice.mllm.tokenizer.decode(document.ids)
    assert "汉语" in documents.voice.mllm.tokenizer.decode(document.ids)
    assert learnt(documents, document) == "把圆形涂成红色。<|im_end|>"


# ---- answers -------------------------------------------------------------------------------------------------------------


def test_only_answers_are_learnt_and_they_are_read_back(documents, records):
    think, reflect = first(records, "think"), first(records, "reflect")
    said = {
        task: learnt(documents, documents.text(think if task == "think" else reflect, task)).removesuffix("<|im_end|>")
        for task in ("think", "describe", "score", "reflect")
    }
    assert parse_thought(said["think"]).instruction == think.editor_instruction
    assert parse_description(said["describe"]) == reflect.reflect.target_description
    assert parse_consistency(said["score"]).score == reflect.reflect.scores.consistency
    verdict = parse_verdict(said["reflect"])
    names = {"success": Decision.SUCCESS, "reflection": Decision.REFINE, "failed": Decision.FAILED}
    assert verdict == (names[reflect.reflect.verdict], reflect.reflect.reason, reflect.reflect.second_instruction)


def test_answers_end_with_the_end_of_the_turn_and_labels_are_the_tokens(documents, records):
    (end,) = documents.voice.mllm.tokenize("<|im_end|>")
    assert end == documents.voice.mllm.tokenizer.eos_token_id
    for record in records:
        for task in documents.tasks_of(record):
            if TASKS[task] == "ntp":
                document = documents.text(record, task)
                rows = document.labels != IGNORED
                assert torch.equal(document.labels[rows], document.ids[rows])
                assert document.ids[-1] == end and rows[-1] and not rows[0]
                assert document.positions.shape == (3, len(document))


def test_conversations_learn_every_answer_and_nothing_else(documents, records):
    record = first(records, "understand")
    turns = tuple((f"Question {n}?", f"Answer {n}.") for n in range(3))
    understand = record.understand.model_copy(update={"turns": tuple(Turn(question=q, answer=a) for q, a in turns)})
    document = documents.text(changed(record, understand=understand), "understand")
    tokenizer = documents.voice.mllm.tokenizer
    assert learnt(documents, document) == "Answer 0.<|im_end|>Answer 1.<|im_end|>Answer 2.<|im_end|>"
    content = "<|vision_start|><|image_pad|><|vision_end|>"
    messages = []
    for number, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": ("" if number else content) + question})
        messages.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    pads = "<|image_pad|>" * sum(token == documents.voice.mllm.image_token_id for token in document.ids.tolist())
    assert tokenizer.decode(document.ids) + "\n" == whole.replace("<|image_pad|>", pads)


# ---- the pieces of answers -----------------------------------------------------------------------------------------------

ANSWERS = {
    "consistency": [
        say_consistency(7.5, 'The "kite" is red.', None),
        say_consistency(10, "Ends with a backslash \\"),
        say_consistency(1, "no", {"meets_instruction": "no", "major_conflicts": 12, "minor_conflicts": 1, "omissions": 3}),
    ],
    "pair": [say_pair((8, 7.5), 'a "b"'), say_pair((10, 0), "x")],
    "verdict": [
        say_verdict(Decision.SUCCESS, "All < is there."),
        say_verdict(Decision.FAILED, "It is torn."),
        say_verdict(Decision.REFINE, "Still blue.", "Paint the kite red."),
    ],
    "free": ["Paint the kite red."],
}


@pytest.fixture(scope="module")
def merging():
    """A byte-level tokenizer with merges, learnt from the very answers so that marks and words do run together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([answer for some in ANSWERS.values() for answer in some] * 5, trainer)
    return tokenizer


@pytest.mark.parametrize(("form", "answer"), [(form, answer) for form, some in ANSWERS.items() for answer in some])
def test_the_decoder_would_feed_exactly_these_tokens(merging, form, answer):
    table = {char: byte for byte, char in enumerate(_bytes_to_chars())}
    pieces = [bytes(table[char] for char in merging.id_to_token(i)) for i in range(merging.get_vocab_size())]
    stop = len(pieces)
    vocabulary = Vocabulary([*pieces, None], [stop], lambda text: merging.encode(text).ids)
    cut = segments(form, answer)
    assert "".join(piece for piece, _ in cut) == answer
    ids = [*(token for piece, _ in cut for token in merging.encode(piece).ids), stop]
    assert len(ids) < len(answer.encode()), "the tokenizer merges nothing, so this shows nothing"
    reply = Reply(form, vocabulary, 512)
    at = len(reply.opening)
    assert ids[:at] == reply.opening
    while not reply.done:
        assert reply.narrow(torch.zeros(len(vocabulary.pieces)))[ids[at]] == 0, merging.decode(ids[: at + 1])
        fed = reply.take(ids[at])
        assert ids[at : at + len(fed)] == fed, merging.decode(ids[:at])
        at += len(fed)
    assert reply.text == answer


def _bytes_to_chars():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def test_a_closing_mark_belongs_to_the_text_before_it():
    """As the decoder feeds them: a token may hold the end of a text and its closing mark."""
    assert segments("verdict", "<#Think> torn <#Reflection> Mend it.") == [
        ("<#Think>", False),
        (" torn <#", True),
        ("Reflection>", True),
        (" Mend it.", True),
    ]
    said = [piece for piece, _ in segments("pair", '{"score": [10, 1.5], "reasoning": "a \\"b\\""}')]
    assert said == ['{"score": [', "10", ", ", "1.5", '], "reasoning": "', 'a \\"b\\""}']


@pytest.mark.parametrize(
    ("form", "answer", "match"),
    [
        ("verdict", "Fine. <#Success>", "expected '<#Think>' at character 0"),
        ("verdict", "<#Think> fine <#Others>", "expected one of Success>"),
        ("verdict", "<#Think> <#Success>", "expected free text"),
        ("verdict", "<#Think> fine <#Success> really", "expected the end"),
        ("pair", '{"score": [8.25, 7], "reasoning": "x"}', "expected one of 0"),
        ("consistency", '{"raw_score": 8}', "expected '{\"meets_instruction"),
        ("free", " \n", "expected free text"),
    ],
)
def test_answers_of_another_form_are_refused(form, answer, match):
    with pytest.raises(DataError, match=match):
        segments(form, answer)


def test_answers_that_do_not_fit_their_question_are_refused(documents, records):
    record = first(records, "think")
    long = changed(record, think=record.think.model_copy(update={"text": "Paint the kite red. " * 40}))
    with pytest.raises(DataError, match=rf"{record.id!r}: think: expected an answer of at most 512 tokens .*think.max_new"):
        documents.text(long, "think")


def test_only_chosen_tokens_count_against_the_question():
    """The literals of a reply cost the decoder no budget."""
    mllm = make_voice("qwen-edit-plus").mllm
    answer = say_consistency(7, "ok")
    query = Query("score", "s", ("?",), (), form="consistency", max_new_tokens=len('yes0101ok"}') + 1)
    transcripts.ask_and_answer(mllm, query, answer, record="r", shown=Shown(), task="score")
    with pytest.raises(DataError, match="at most 8 tokens"):
        transcripts.ask_and_answer(mllm, replace(query, max_new_tokens=8), answer, record="r", shown=Shown(), task="score")


# ---- which tasks ---------------------------------------------------------------------------------------------------------


def test_tasks_of_drawn_records(documents, records):
    found = {record.kind: set(documents.tasks_of(record)) for record in records if not record.references}
    assert found["edit"] == found["hypothetical"] == {"edit"} and found["t2i"] == {"t2i"}
    assert found["think"] == {"think", "edit"} and found["understand"] == {"understand"}
    reflects = [record for record in records if record.kind == "reflect"]
    for record in reflects:
        refines = record.reflect.verdict == "reflection"
        expected = {"describe", "score", "reflect", "edit"} | ({"refine"} if refines else set())
        assert set(documents.tasks_of(record)) == expected
    assert any(record.reflect.verdict == "reflection" for record in reflects)


def test_the_two_marks_are_learnt_on_request_where_there_are_two(documents, records):
    record = first(records, "reflect")
    both = Documents(documents.voice, tasks=tuple(TASKS))
    pairs = record.reflect.scores.model_copy(update={"edit": (8.0, 7.5), "quality": 6.0})
    marked = changed(record, reflect=record.reflect.model_copy(update={"scores": pairs}))
    assert "edit_score" in both.tasks_of(marked) and "quality_score" not in both.tasks_of(marked)
    assert "edit_score" not in documents.tasks_of(marked) and "edit_score" not in USUAL
    assert learnt(both, both.text(marked, "edit_score")).startswith('{"score": [8, 7.5], "reasoning": ')


# ---- conditioning and sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_conditions_are_those_of_the_generator(name, records):
    voice = make_voice(name)
    documents = Documents(voice)
    record = next(r for r in records if r.kind == "edit" and not r.references)
    width, height = documents.size(record, "input")
    plan = voice.geometry.plan([(width, height)], voice.level)
    layout = documents.layout(record, "edit")
    assert layout.names == ("target", "input") and layout.sizes == (plan.output, *plan.vae)
    assert layout.grids == tuple((h // 16, w // 16) for w, h in layout.sizes)
    picture = voice.geometry.to_mllm(documents.open(record, "input"), plan.mllm[0])
    for words, dropped in ((record.editor_instruction, False), (voice.negative, True)):
        expected = voice.conditioner.document(picture, words)
        found = documents.condition(record, "edit", dropped=dropped)
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.positions, expected.positions)
        assert (found.kept, found.fillers) == (expected.kept, expected.fillers) and found.n_answers == 0
        assert torch.equal(found.patches[0].values, expected.patches[0].values)
        assert (found.place is None) == (name != "step1x-v1p2")
    t2i = first(records, "t2i")
    assert documents.layout(t2i, "t2i").names == ("target",)
    assert torch.equal(documents.condition(t2i, "t2i").ids, voice.conditioner.document(None, t2i.caption).ids)


def test_refinements_begin_from_the_generated_picture(documents, records):
    record = next(r for r in records if r.kind == "reflect" and r.reflect.second_instruction)
    layout = documents.layout(record, "refine")
    assert layout.names == ("target", "generated") and layout.instruction == record.reflect.second_instruction
    assert [name for name, _ in layout.seen] == ["generated"]


def test_references_follow_the_input():
    documents = Documents(make_voice("qwen-edit-plus"))
    record = next(record for record in drawn_records(48, 1.0) if record.references)
    layout = documents.layout(record, "edit")
    assert layout.names == ("target", "input", "reference_2") and [name for name, _ in layout.seen] == ["input", "reference_2"]
    assert len(documents.condition(record, "edit").patches) == 2


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cached", [False, True])
def test_documents_are_as_long_as_they_were_measured(name, cached):
    """Of every kind and task, without a picture having been opened."""

    def closed(record, name):
        raise AssertionError(f"{name} of {record.id} was opened to be measured")

    voice = make_voice(name)
    records = drawn_records(48, 1.0)
    sources, items, refused = Documents(voice, open_picture=closed).items(records, states_cached=cached)
    documents = Documents(voice)
    assert {task for _, task in sources.values()} == set(USUAL)
    for item in items:
        record, task = sources[item.id]
        if item.loss == "ntp":
            assert (item.text, item.image) == (len(documents.text(record, task)), 0)
            continue
        forms = [documents.condition(record, task, dropped=dropped) for dropped in (False, True)]
        texts = [form.kept.stop - form.kept.start + form.fillers for form in forms]
        assert item.text == (0 if cached else max(map(len, forms)))
        assert item.image == max(texts) + sum(documents.layout(record, task).tokens)
    # Only systems that take one picture refuse references, by name.
    assert {each.id for each in refused} == (
        set() if name == "qwen-edit-plus" else {f"{record.id}/edit" for record in records if record.references}
    )
    assert all("records.jsonl:" in each.why and "reference" in each.why for each in refused)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(28, 2600),
    st.integers(28, 2600),
    st.sampled_from([Shown(), Shown(max_side=None), Shown(snap=False), Shown(3136, 12544, 333, True)]),
)
def test_sizes_are_told_without_the_picture(width, height, shown):
    picture = torch.zeros(1, 3, 1, 1).expand(1, 3, height, width)
    _, size, _ = prepare(
        picture, min_pixels=shown.min_pixels, max_pixels=shown.max_pixels, max_side=shown.max_side, snap=shown.snap
    )
    assert shown_size((width, height), shown) == size


def test_lengths_are_kept_and_never_stale(records, tmp_path):
    documents = Documents(make_voice("step1x-v1p2"))
    _, items, _ = documents.items(records, lengths=Lengths(tmp_path, documents.voice.fingerprint))

    class Kept(Documents):
        measured = 0

        def measure(self, record, task):
            self.measured += 1
            return super().measure(record, task)

    again = Kept(documents.voice)
    lengths = Lengths(tmp_path, documents.voice.fingerprint)
    assert again.items(records, lengths=lengths)[1] == items and not again.measured
    cached = again.items(records, lengths=lengths, states_cached=True)[1]
    assert [item.image for item in cached] == [item.image for item in items] and not again.measured
    assert all(item.text == 0 for item in cached if item.loss == "fm")
    think = first(records, "think")
    longer = changed(think, instruction=think.instruction.model_copy(update={"raw": think.instruction.raw + " Please."}))
    longer._place = think.source
    (other, *_) = again.items([longer], losses=("ntp",), lengths=lengths)[1]
    assert again.measured == 1 and other.text > next(item.text for item in items if item.id == other.id)
    lengths.path.write_text('{"a": 3')
    assert Lengths(tmp_path, documents.voice.fingerprint).get("a") is None


# ---- faults --------------------------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_used_is_refused_by_name_and_the_others_go_on(documents, records):
    record = first(records, "reflect")
    broken = changed(record, reflect=record.reflect.model_copy(update={"reason": "torn <#Success> really"}))
    _, items, refused = documents.items([broken, first(records, "t2i")])
    assert {each.id for each in refused} == {f"{record.id}/{task}" for task in ("score", "reflect")}
    assert f"{record.source}: record {record.id!r}: reflect: " in refused[-1].why
    assert {item.id.rpartition("/")[2] for item in items} >= {"describe", "edit", "t2i"}


@pytest.mark.parametrize("name", ["step1x-v1p2", "step1x-v1p1"])
def test_conditions_that_would_be_cut_are_refused_by_name(name, records):
    documents = Documents(make_voice(name))
    record = next(r for r in records if r.kind == "edit" and not r.references)
    room = documents.voice.conditioner.budget // 2
    for words, fits in (("red " * (room // 4), True), ("red " * 600, False)):
        told = changed(record, edit=Edit(instruction_used=words.strip()))
        _, items, refused = documents.items([told])
        assert bool(items) == fits and [each.id for each in refused] == ([] if fits else [f"{record.id}/edit"])
        assert fits or ("tokens that condition the edit" in refused[0].why and "records.jsonl:" in refused[0].why)


def test_a_missing_picture_names_record_and_field(documents, records, tmp_path):
    record = first(records, "think")
    moved = changed(record)
    moved._place = type(record.source)(str(tmp_path / "records.jsonl"), 7)
    _, items, refused = documents.items([moved])
    assert not items and "records.jsonl:7" in refused[0].why and "images.input" in refused[0].why


# ---- fingerprint ---------------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_everything_that_documents_are_made_of():
    voice = make_voice("step1x-v1p2")
    base = make_voice("step1x-v1p2").fingerprint
    assert voice.fingerprint == base
    think = voice.pack.task("think")
    spoken = replace(think, user=(*think.user, Part(text=("!",))))
    packs = {code: replace(p, tasks={**p.tasks, "think": spoken}) for code, p in voice.pack.translations.items()}
    other = [
        replace(voice, pack=replace(voice.pack, translations=packs)),
        replace(voice, level=128),
        replace(voice, shown=Shown(3136, 6272)),
        replace(voice, paired=True),
        replace(voice, negative="blurred"),
        replace(voice, geometry=replace(voice.geometry, multiple=32)),
        replace(voice, conditioner=make_voice("step1x-v1p1").conditioner),
    ]
    assert len({base, *(each.fingerprint for each in other)}) == 1 + len(other)
