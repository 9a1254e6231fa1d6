"""The reasoner asks the right questions with the right pictures, repeats unreadable replies, and never makes one up."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from reasonedit.reasonedit_core.dialogue.prompts import Pack, default_pack, load_pack
from reasonedit.reasonedit_core.errors import ConfigError, Interrupted, MalformedReply, ReasonerError
from reasonedit.reasonedit_core.reasoners.reasoner import PackReasoner
from reasonedit.reasonedit_core.reasoners.scripted import ScriptedSpeaker
from reasonedit.reasonedit_core.types import Decision

SCORE = json.dumps(
    {
        "meets_instruction": "partial",
        "major_conflicts": 1,
        "minor_conflicts": 0,
        "omissions": 0,
        "raw_score": 8,
        "reason": "blue",
    }
)
PAIR = '{"score": [7, 8], "reasoning": "ok"}'
REFINE = "<#Think> still blue <#Reflection> Paint it red. "
GOOD = {"score": [SCORE], "edit_score": [PAIR], "quality_score": ['{"score": [6, 9], "reasoning": ""}'], "reflect": [REFINE]}
SOURCE, RESULT = "SOURCE", "RESULT"


def reflect(replies=GOOD, *, goal="Make the kite red", original=None, pack=None, **options):
    speaker = ScriptedSpeaker(replies)
    reasoner = PackReasoner(pack or default_pack(), speaker, **options)
    return reasoner.reflect(SOURCE, RESULT, goal, "A red kite.", original=original), speaker


def imported_like() -> Pack:
    """A pack with the paired forms only, in one wording for every language, as the importer makes it."""
    own = load_pack("en")
    tasks = {name: prompt for name, prompt in own.tasks.items() if name not in ("reflect", "edit_score")}
    return replace(own, tasks=tasks, language="any", imported=True)


def test_think():
    speaker = ScriptedSpeaker({"think": ['"Paint the kite red. Remove the cloud."']})
    thought = PackReasoner(default_pack(), speaker).think(SOURCE, "festive please")
    assert thought.original == "festive please"
    assert thought.instruction == "Paint the kite red. Remove the cloud."
    assert thought.steps == ("Paint the kite red.", "Remove the cloud.")
    assert thought.raw.startswith('"')
    (asked,) = speaker.asked
    assert (asked.task, asked.images, asked.form) == ("think", (SOURCE,), "free")
    assert "festive please" in asked.parts[1]


def test_feedback_reaches_the_question():
    speaker = ScriptedSpeaker({"think": ["a", "b"]})
    reasoner = PackReasoner(default_pack(), speaker)
    reasoner.think(SOURCE, "x")
    reasoner.think(SOURCE, "x", feedback="too dark")
    assert ["too dark" in query.parts[1] for query in speaker.asked] == [False, True]
    assert speaker.asked[0].seed != speaker.asked[1].seed


def test_describe_sees_the_users_words_only_where_they_differ():
    speaker = ScriptedSpeaker({"describe": [" A red kite.\n"] * 3})
    reasoner = PackReasoner(default_pack(), speaker)
    assert reasoner.describe(SOURCE, "Paint it red", original="festive") == "A red kite."
    reasoner.describe(SOURCE, "Paint it red", original="Paint it red ")
    reasoner.describe(SOURCE, "Paint it red")
    assert ["<request>" in query.parts[1] for query in speaker.asked] == [True, False, False]


def test_reflect_scores_together_then_decides():
    batches = []

    class Watched(ScriptedSpeaker):
        def answer(self, queries, **options):
            batches.append([query.task for query in queries])
            return super().answer(queries, **options)

    reflection = PackReasoner(default_pack(), Watched(GOOD)).reflect(SOURCE, RESULT, "Make the kite red", "A red kite.")
    assert batches == [["score", "edit_score", "quality_score"], ["reflect"]]
    assert (reflection.decision, reflection.reason, reflection.instruction) == (Decision.REFINE, "still blue", "Paint it red.")
    scores = reflection.scores
    assert (scores.edit, scores.quality, scores.consistency, scores.consistency_reason) == ((7, 8), (6, 9), 5.0, "blue")
    assert reflection.raw == REFINE


def test_the_decision_is_told_goal_words_score_and_reason():
    _, speaker = reflect(original="festive")
    text = speaker.asked[-1].parts[-1]
    for told in ("Make the kite red", "festive", "A red kite.", "5.0", "blue"):
        assert told in text


@pytest.mark.parametrize(("paired", "pictures"), [(False, (RESULT,)), (True, (SOURCE, RESULT))])
def test_pictures_shown(paired, pictures):
    _, speaker = reflect(paired=paired)
    shown = {query.task: query.images for query in speaker.asked}
    assert shown == {"score": (RESULT,), "edit_score": pictures, "quality_score": (RESULT,), "reflect": pictures}


def test_a_pack_with_one_form_is_used_as_it_is_and_that_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        _, speaker = reflect(pack=imported_like())
    assert {query.task: len(query.images) for query in speaker.asked}["reflect"] == 2
    assert caplog.text.count("has no reflect:") == 1
    caplog.clear()
    with caplog.at_level(logging.INFO):
        reflect(pack=imported_like(), paired=True)
    assert not caplog.records


def test_language_follows_the_instruction():
    _, speaker = reflect(goal="把风筝变红")
    assert "画面" in speaker.asked[0].parts[1]
    _, speaker = reflect(goal="把风筝变红", pack=imported_like())
    assert "Chinese" in speaker.asked[0].parts[1]


def test_released_reading():
    reflection, _ = reflect({**GOOD, "edit_score": ['{"score": [3], "reasoning": ""}']}, released=True)
    assert reflection.instruction == " Paint it red."
    assert reflection.scores.edit == (3.0,)
    others = {**GOOD, "reflect": ["<#Think> hm <#Others>"]}
    assert reflect(others, released=True)[0].decision is Decision.SUCCESS
    with pytest.raises(ReasonerError):
        reflect(others)


# ---- replies that cannot be read -----------------------------------------------------------------------------------------


def test_only_unreadable_replies_are_asked_for_again():
    replies = {**GOOD, "edit_score": ["nonsense", '{"score": [7', PAIR]}
    reflection, speaker = reflect(replies)
    assert reflection.scores.edit == (7.0, 8.0)
    asked = [query for query in speaker.asked if query.task == "edit_score"]
    assert [len([q for q in speaker.asked if q.task == task]) for task in ("score", "quality_score", "reflect")] == [1, 1, 1]
    first, second, third = asked
    assert (second.seed - first.seed, third.seed - first.seed) == (1, 2)
    # Asked greedily again, the same model would give the same reply.
    assert first.temperature == 0 and second.temperature == third.temperature == 0.7
    assert replace(second, seed=0, temperature=0, top_p=1) == replace(first, seed=0)


@pytest.mark.parametrize("key", ["score", "edit_score", "quality_score", "reflect"])
def test_bounded_attempts_then_malformed_reply(key):
    with pytest.raises(MalformedReply, match=f"{key}: no readable reply in 2 attempts.*expected.*found") as caught:
        reflect({**GOOD, key: ["first", "second", "third"]}, attempts=2)
    assert caught.value.raw == "second"


@pytest.mark.parametrize("task", ["think", "describe"])
def test_free_text_is_asked_for_again_too(task):
    speaker = ScriptedSpeaker({task: ["", "Paint it."]})
    reasoner = PackReasoner(default_pack(), speaker)
    made = reasoner.think(SOURCE, "x").instruction if task == "think" else reasoner.describe(SOURCE, "x")
    assert made == "Paint it."
    with pytest.raises(MalformedReply, match=f"{task}: no readable reply in 1 attempts"):
        PackReasoner(default_pack(), ScriptedSpeaker({task: [""]}), attempts=1).__getattribute__(task)(SOURCE, "x")


def test_sampled_questions_keep_their_sampling():
    pack = default_pack()
    sampled = {name: replace(prompt, temperature=0.3, top_p=0.5) for name, prompt in pack.tasks.items()}
    pack = replace(pack, tasks=sampled, translations={})
    _, speaker = reflect({**GOOD, "reflect": ["?", REFINE]}, pack=pack)
    assert {(query.temperature, query.top_p) for query in speaker.asked} == {(0.3, 0.5)}


def test_correction_is_told_only_to_speakers_that_take_it():
    class Remote(ScriptedSpeaker):
        takes_correction = True

    replies = {"think": ["", "ok"]}
    for kind, length in ((ScriptedSpeaker, 2), (Remote, 3)):
        speaker = kind(replies)
        PackReasoner(default_pack(), speaker).think(SOURCE, "x")
        assert [len(query.parts) for query in speaker.asked] == [2, length]
    assert "an empty reply" in speaker.asked[1].parts[-1]


# ---- seeds and binding ---------------------------------------------------------------------------------------------------


def test_seeds_follow_from_seed_task_and_words_alone():
    def seeds(seed, goal="Make the kite red"):
        return [query.seed for query in reflect(goal=goal, seed=seed)[1].asked]

    assert seeds(1) == seeds(1)
    assert len(set(seeds(1))) == 4
    assert not set(seeds(1)) & set(seeds(2))
    assert not set(seeds(1)[:2]) & set(seeds(1, "other")[:2])
    assert all(0 <= seed < 2**30 for seed in seeds(-5))


def test_bound_is_a_copy_for_one_run():
    told = []
    speaker = ScriptedSpeaker({"think": ["a", "b"]})
    reasoner = PackReasoner(default_pack(), speaker, paired=True)
    bound = reasoner.bound(seed=4, on_text=lambda *text: told.append(text))
    bound.think(SOURCE, "x")
    reasoner.think(SOURCE, "x")
    assert told == [("think", "a")]
    assert speaker.asked[0].seed != speaker.asked[1].seed
    assert bound.paired and reasoner.seed == 0
    with pytest.raises(Interrupted):
        reasoner.bound(should_stop=lambda: True).think(SOURCE, "x")


def test_attempts_must_be_positive():
    with pytest.raises(ConfigError, match="at least 1 attempt"):
        PackReasoner(default_pack(), ScriptedSpeaker({}), attempts=0)
