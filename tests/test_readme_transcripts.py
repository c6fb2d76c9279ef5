"""The transcripts in README and docs are played with real processes, and print what is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from admin_fakes import short_folder
from transcripts import Step, matches, stage, steps_of

ROOT = Path(__file__).resolve().parent.parent
JOINING = ROOT / "docs" / "joining.md"
DOCUMENTS = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if steps_of(path.read_text("utf-8"))
]


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_a_transcript_prints_what_is_written(path):
    with short_folder() as folder, stage(folder) as played:
        assert played.play(path.read_text("utf-8")) == []


# --- the ceremony --------------------------------------------------------------------------------


def test_the_ceremony_takes_four_commands_at_a_hospital_and_two_at_the_steward():
    steps = steps_of(_section("A hospital comes in"))
    verbs = [(s.where, _verb(s)) for s in steps]
    assert verbs == [
        ("Ana's desk", "invite create"),
        ("North", "init"),
        ("Ana's desk", "invite approve"),
        ("North", "node"),
        ("North", "join"),
        ("North", "run accept"),
    ]


def _section(title: str) -> str:
    return JOINING.read_text("utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _verb(step: Step) -> str:
    words = re.sub(r"^p2pfed (-c \S+ )?", "", step.command).split()
    return " ".join(words[:2] if words[0] in {"invite", "run"} else words[:1])


# --- reading and comparing -----------------------------------------------------------------------

STORY = """\
# A title

```sh
$ not a transcript
```

```console
# at the desk
$ echo one
one

# at North
$ printf 'a\\n# warning\\n' \\
  | cat
a
# warning
```

```console
$ true
```
"""


def test_a_transcript_is_read_with_its_places_and_lines():
    steps = steps_of(STORY)
    assert [(s.where, s.line, _stripped(s)) for s in steps] == [
        ("the desk", 9, ["one"]),
        ("North", 13, ["a", "# warning"]),
        ("", 20, []),
    ]
    assert steps[1].command == "printf 'a\\n# warning\\n' \\\n  | cat"


def _stripped(step: Step) -> list[str]:
    return [line for line in step.expected if line]


def test_output_above_the_first_command_is_a_mistake():
    with pytest.raises(AssertionError, match="line 2 is the output of no command"):
        steps_of("```console\nhello\n```\n")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ([], ""),
        (["one"], "one\n"),
        (["one", ""], "one  \n\n"),
        (["o…e … x"], "one two x\n"),
        (["…"], ""),
        (["…"], "a\nb\n"),
        (["a", "…", "z"], "a\nz\n"),
        (["a", "…", "z"], "a\nb\n\nc\nz\n"),
        (["(.*) [x]"], "(.*) [x]\n"),
    ],
)
def test_what_is_written_matches_what_is_told(written, told):
    assert matches(written, told)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ([], "one\n"),
        (["one"], ""),
        (["one"], "two\n"),
        (["one"], "one\ntwo\n"),
        (["one", "two"], "one\n"),
        (["a", "…", "z"], "a\nb\n"),
        (["a…c"], "ab\nc\n"),
        (["…x"], "y\n"),
        ([".*"], "one\n"),
    ],
)
def test_any_difference_is_seen(written, told):
    assert not matches(written, told)


@pytest.mark.slow
def test_a_story_that_prints_something_else_fails_and_says_where(tmp_path):
    with stage(tmp_path) as played:
        assert played.play(STORY) == []
        (told,) = played.play(STORY.replace("\none\n", "\ntwo\n"))
    assert told.startswith("line 9: $ echo one") and "told:\none" in told


@pytest.mark.slow
def test_each_place_has_a_home_of_its_own_and_ports_are_free_ones(tmp_path):
    with stage(tmp_path) as played:
        homes = {played.run(where, "echo $HOME $P2PFED_HOME") for where in ("North", "South")}
        assert len(homes) == 2
        first = played.run("North", "echo /tcp/4201 /tcp/4202 4201")
        assert first == played.run("South", "echo /tcp/4201 /tcp/4202 4201")
        assert first.split()[2] == "4201" and "/tcp/4201" not in first


@pytest.mark.slow
def test_nothing_is_left_running(tmp_path):
    with stage(tmp_path) as played:
        played.run("North", "p2pfed init --name North --dir north --listen /ip4/127.0.0.1/tcp/4201")
        played.run("North", "p2pfed node -c north/p2pfed.toml")
        (node,) = played._nodes
        assert node.poll() is None
    assert node.poll() is not None
