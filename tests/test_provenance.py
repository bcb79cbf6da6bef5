"""A file under its final name is whole, and an out is one run's or nobody's."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.worlds import run_code

from pipeline.core import provenance
from pipeline.core.errors import PipelineError
from pipeline.core.layout import STAMP_FILE
from pipeline.core.provenance import PARTIAL, content, read_stamp
from pipeline.core.records import Recipe
from pipeline.core.work import Work

NAMES = ["a.txt", "sub/b.txt"]


def work_of(data: Path, values: dict, stage: str = "stage") -> Work:
    return Work(data, stage, data / "out", Recipe(parameters=values))


def finish(data: Path, recipe: dict, stage: str = "stage", text: str | None = None) -> Work:
    """A whole run whose files say which parameters made them."""
    work = work_of(data, recipe, stage)
    if not work.published():
        work.begin()
        for name in NAMES:
            if not work.has(name):
                made = text or json.dumps(recipe)
                work.commit(name, lambda partial, made=made: partial.write_text(made))
        work.publish(NAMES, {"files": len(NAMES)})
    return work


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Publishing


def test_an_out_is_exactly_the_files_of_its_run_and_the_stamp(tmp_path):
    work = finish(tmp_path, {"n": 1})
    assert set(files(work.out)) == {*NAMES, STAMP_FILE}
    stamp = read_stamp(work.out, "stage")
    assert stamp.stamp == work.stamp and stamp.recipe.parameters == {"n": 1}
    for name, file in stamp.files.items():
        assert file.sha256 == provenance.file_digest(work.out / name)
        assert file.bytes == (work.out / name).stat().st_size


def test_a_second_run_of_the_same_recipe_finds_itself_published(tmp_path):
    before = finish(tmp_path, {"n": 1})
    times = {path: path.stat().st_mtime_ns for path in before.out.rglob("*")}
    assert finish(tmp_path, {"n": 1}, text="never written").published()
    assert {path: path.stat().st_mtime_ns for path in before.out.rglob("*")} == times


def test_another_recipe_replaces_every_file_and_removes_the_older_work(tmp_path):
    old, new = finish(tmp_path, {"n": 1}), finish(tmp_path, {"n": 2})
    assert not old.published() and new.published()
    assert {text for name, text in files(new.out).items() if name != STAMP_FILE} == {'{"n": 2}'}
    assert not old.folder.exists() and new.folder.exists()


@pytest.mark.parametrize("damage", ["missing", "shorter", "no stamp", "unexpected file"])
def test_an_out_that_is_not_whole_is_not_published(tmp_path, damage):
    work = finish(tmp_path, {"n": 1})
    changed = work.out / NAMES[1]
    if damage == "missing":
        changed.unlink()
    elif damage == "shorter":
        changed.unlink()
        changed.write_text("")
    elif damage == "no stamp":
        (work.out / STAMP_FILE).unlink()
    else:
        (work.out / "mine.txt").write_text("")
    assert not work.published()


def test_an_emptied_out_is_filled_from_the_work_folder_without_new_work(tmp_path):
    """DVC deletes the outs before it runs a stage."""
    work = finish(tmp_path, {"n": 1})
    before = files(work.out)
    shutil.rmtree(work.out)
    finish(tmp_path, {"n": 1}, text="made anew")
    assert files(work.out) == before


def test_what_was_damaged_in_place_is_made_anew_once_the_out_is_deleted(tmp_path):
    """Out and work folder share their bytes: the work folder's copy is damaged with the out's."""
    work = finish(tmp_path, {"n": 1})
    before = files(work.out)
    with (work.out / NAMES[0]).open("r+b") as file:
        file.write(b"X")
    assert (work.folder / NAMES[0]).read_bytes().startswith(b"X")
    shutil.rmtree(work.out)  # what every message about damage advises
    finish(tmp_path, {"n": 1})
    assert files(work.out) == before


@pytest.mark.parametrize("step", [2, 4, 6, 7, 8, 12, 13, 14, 15, 16, 18, 19])
def test_a_run_killed_at_any_step_of_publishing_leaves_one_whole_run_or_none(tmp_path, step):
    """The process ends without warning at its n-th change of a name on disk."""
    finish(tmp_path, {"n": 1})
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import test_provenance
        from support import worlds
        worlds.end_at_step(int(sys.argv[3]), "rename", "replace", "link", "rmdir", "mkdir")
        test_provenance.finish(Path(sys.argv[2]), {"n": 2})
    """
    run_code(code, Path(__file__).parent, tmp_path, step).communicate()
    out = tmp_path / "out"
    if out.exists():
        recipe = read_stamp(out, "stage").recipe.parameters
        expected = dict.fromkeys(NAMES, json.dumps(recipe))
        assert {n: t for n, t in files(out).items() if n != STAMP_FILE} == expected
    again = finish(tmp_path, {"n": 2})
    assert again.published()
    assert {n: t for n, t in files(out).items() if n != STAMP_FILE} == dict.fromkeys(
        NAMES, '{"n": 2}'
    )
    assert not list(tmp_path.rglob("*" + PARTIAL))


# Unexpected files


def test_an_unexpected_file_is_refused_named_and_left_alone(tmp_path):
    finish(tmp_path, {"n": 1})
    (tmp_path / "out/holiday.jpg").write_text("mine")
    for recipe in ({"n": 1}, {"n": 2}):
        with pytest.raises(PipelineError, match=r"holiday\.jpg"):
            finish(tmp_path, recipe)
    assert (tmp_path / "out/holiday.jpg").read_text() == "mine"


@pytest.mark.parametrize("stamp", [None, "{}", "[]", "no json", '{"stage": "other"}'])
def test_a_folder_that_is_not_ours_is_refused_whatever_its_stamp_says(tmp_path, stamp):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.txt").write_text("mine")
    if stamp is not None:
        (tmp_path / "out" / STAMP_FILE).write_text(stamp)
    with pytest.raises(PipelineError, match="is damaged" if stamp else "did not write"):
        finish(tmp_path, {"n": 1})
    assert (tmp_path / "out/a.txt").read_text() == "mine"


def test_the_out_of_another_stage_is_refused(tmp_path):
    finish(tmp_path, {"n": 1}, stage="first")
    with pytest.raises(PipelineError, match="second did not write"):
        finish(tmp_path, {"n": 1}, stage="second")


def test_a_file_in_the_place_of_the_out_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(PipelineError, match="did not write: out"):
        finish(tmp_path, {"n": 1})


def test_an_empty_folder_is_nobodys(tmp_path):
    (tmp_path / "out").mkdir()
    assert finish(tmp_path, {"n": 1}).published()


# Stamps


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"stamp": 1}', '"files"'])
def test_a_damaged_stamp_is_named_with_the_way_out(tmp_path, text):
    (tmp_path / STAMP_FILE).write_text(text)
    with pytest.raises(PipelineError, match=r"stamp\.json is damaged.*pipeline teacher-embed"):
        read_stamp(tmp_path, "teacher_embed")


TELLING = b' \n\t"\\{}[]:,.-+eE019aAfFu'  # bytes that mean something in JSON


def changed_texts(text: bytes, values: bytes) -> Iterator[bytes]:
    """A text cut at each place; each byte lost, doubled, with a bit flipped, or one of values."""
    for at, byte in enumerate(text):
        yield text[:at]
        others = {*values, *(byte ^ 1 << bit for bit in range(8))} - {byte}
        for instead in (b"", bytes([byte, byte]), *(bytes([other]) for other in others)):
            yield text[:at] + instead + text[at + 1 :]


@pytest.mark.parametrize(
    "values", [TELLING, pytest.param(bytes(range(256)), marks=pytest.mark.faults)], ids=len
)
def test_a_change_anywhere_in_a_stamp_is_refused_unless_it_says_the_same(tmp_path, values):
    out = finish(tmp_path, {"n": [1, 0.1, None], "of": "caf\u00e9"}).out
    sound, text = read_stamp(out, "stage"), (out / STAMP_FILE).read_bytes()
    accepted = 0
    with (out / STAMP_FILE).open("r+b", buffering=0) as file:  # opening it anew each time is slow
        for changed in changed_texts(text, values):
            file.seek(0)
            file.truncate(file.write(changed))
            try:
                found = read_stamp(out, "stage")
            except PipelineError as error:
                assert str(error).endswith(f"Delete {out} and run `pipeline stage`.")
            else:
                assert found == sound, changed
                accepted += 1
    assert accepted, "other blanks between values"


def test_a_stamp_without_a_digest_of_itself_is_damaged(tmp_path):
    """As earlier versions wrote them."""
    out = finish(tmp_path, {"n": 1}).out
    stamp = read_stamp(out, "stage")
    (out / STAMP_FILE).write_text(stamp.model_dump_json(exclude={"digest"}))
    with pytest.raises(PipelineError, match=r"wrong in it: digest\).*Delete .*out and run"):
        finish(tmp_path, {"n": 1})


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_stamp_costs_no_file_that_it_still_vouches_for(tmp_path, cut):
    """Out and work folder share the stamp as well: its damage is in both."""
    work = finish(tmp_path, {"n": 1})
    before = files(work.out)
    with (work.out / STAMP_FILE).open("r+b") as file:
        if cut:
            file.truncate(before[STAMP_FILE].index('"recipe"'))  # behind the files' digests
        else:
            file.seek(before[STAMP_FILE].index('"stage"') + 1)
            file.write(b"X")
    (work.folder / NAMES[0]).write_text("damaged too")
    with pytest.raises(PipelineError, match="is damaged"):
        finish(tmp_path, {"n": 1})
    shutil.rmtree(work.out)  # what the message advises
    kept = (work.folder / NAMES[1]).stat().st_mtime_ns
    finish(tmp_path, {"n": 1})
    assert files(work.out) == before
    assert (work.folder / NAMES[1]).stat().st_mtime_ns == kept


def test_a_missing_stamp_names_the_command_to_run_first(tmp_path):
    with pytest.raises(PipelineError, match="Run `pipeline teacher-embed` first"):
        read_stamp(tmp_path / "none", "teacher_embed")


def test_stamps_chain_so_that_a_change_of_the_first_input_reaches_the_last(tmp_path):
    def chain(value: int, folder: Path) -> list[str]:
        first = finish(folder / "1", {"value": value})
        second = finish(folder / "2", {"input": content(read_stamp(first.out, "stage"))})
        third = finish(folder / "3", {"input": content(read_stamp(second.out, "stage"))})
        return [first.stamp, second.stamp, third.stamp]

    one, again, two = (chain(v, tmp_path / name) for v, name in ((1, "a"), (1, "b"), (2, "c")))
    assert one == again
    assert not set(one) & set(two)


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert provenance.digest({"a": 1, "b": [2]}) == provenance.digest({"b": [2], "a": 1})
    assert provenance.digest({"a": 1}) != provenance.digest({"a": "1"})


# Taking over


def test_earlier_runs_are_offered_newest_first_and_the_out_last(tmp_path):
    finish(tmp_path, {"n": 1})
    for n in (2, 3):  # both killed before they published
        work = work_of(tmp_path, {"n": n})
        work.begin()
        os.utime(work.folder, (n, n))
    now = work_of(tmp_path, {"n": 4})
    recipes = [work_of(tmp_path, {"n": n}).folder for n in (1, 3, 2)]
    assert now.earlier() == [*recipes, tmp_path / "out"]


def test_files_are_copied_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert finish(tmp_path, {"n": 1}).published()


# Files


def test_a_failed_write_leaves_neither_a_half_file_nor_a_changed_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        provenance.write_file(path, fail)
    assert files(tmp_path) == {"file": "before"}


def test_a_process_killed_while_writing_leaves_no_final_file_and_the_rest_is_swept(tmp_path):
    code = """
        import os, sys
        from pathlib import Path
        from pipeline.core.work import Work
        from pipeline.core.records import Recipe
        recipe = Recipe(parameters={"n": 1})
        work = Work(Path(sys.argv[1]), "stage", Path(sys.argv[1], "out"), recipe)
        work.begin()
        def half(partial):
            partial.write_text("half")
            os.kill(os.getpid(), 9)
        work.commit("sub/b.txt", half)
    """
    run_code(code, tmp_path).communicate()
    work = work_of(tmp_path, {"n": 1})
    assert list(work.folder.rglob("*" + PARTIAL)) and not work.has("sub/b.txt")
    finish(tmp_path, {"n": 1})
    assert not list(tmp_path.rglob("*" + PARTIAL))
