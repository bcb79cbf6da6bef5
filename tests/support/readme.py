"""README's search in twenty lines, and a process that has four packages to run it."""

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def readme_block() -> str:
    (block,) = re.findall(r"```python\n(# search.py.*?)```", README, re.DOTALL)
    return block


ALONE = """
import sys
allowed = {"numpy", "PIL", "onnxruntime", "tokenizers"} | set(sys.stdlib_module_names)
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ImportError(f"{name} is not one of the four packages")
sys.meta_path.insert(0, Closed())
exec(compile(sys.stdin.read(), "search.py", "exec"))
"""
