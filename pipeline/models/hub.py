"""Where a student lies: a folder of this disk, an exported folder, or a name on the Hugging Face Hub.

Only the student's two files are fetched, and nothing in them is executed.
"""

import re
from pathlib import Path

from pipeline.core.errors import PipelineError

FILES = ("config.json", "model.safetensors")
INSIDE = "student"  # where an exported folder holds them
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def student_folder(source: Path | str) -> Path:
    """The local folder with a student's files.

    source: a folder that `Student.save` or `pipeline export` wrote, or a str `user/name` on the
    Hub, where neither it nor a folder `user` exists here. Raises PipelineError where the Hub
    cannot be asked or holds no student under the name.
    """
    folder = Path(source)
    if (folder / INSIDE / FILES[0]).is_file():
        return folder / INSIDE
    named = isinstance(source, str) and NAME.fullmatch(source)
    if named and not folder.exists() and not folder.parent.exists():
        return _fetched(source)
    return folder


def _fetched(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        files = [Path(hf_hub_download(name, f"{INSIDE}/{file}")) for file in FILES]
    except RepositoryNotFoundError:
        raise PipelineError(
            f"no folder {name}, and the Hub knows no model of that name (or it is private: "
            "`hf auth login`)."
        ) from None
    except (EntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PipelineError(
            f"no folder {name}, and from the Hub it cannot be had: {reason}. A model there needs "
            f"{' and '.join(f'{INSIDE}/{file}' for file in FILES)}, as `pipeline export` writes them."
        ) from None
    return files[0].parent
