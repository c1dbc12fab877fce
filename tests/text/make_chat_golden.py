"""Write data/chat_golden.json: what transformers makes of llama.cpp's chat templates and tests/chat_cases.py.

Usage: PYTHONPATH=tests python tests/text/make_chat_golden.py TEMPLATES_DIR   (needs transformers 5 and Jinja2)
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from pathlib import Path

import chat_cases
import transformers
from transformers.utils import chat_template_utils

GOLDEN = Path(__file__).parent / "data" / "chat_golden.json"


class Clock(datetime.datetime):
    """A clock that stands."""

    @classmethod
    def now(cls, tz: object = None) -> datetime.datetime:
        """Return the moment of the cases."""
        return datetime.datetime(*chat_cases.TODAY)


def rendered(tokenizer: transformers.PreTrainedTokenizerBase, source: str, case: dict) -> str:
    """Return the SHA-256 of the text, or "raises"."""
    try:
        options = {"add_generation_prompt": True, **case}
        text = tokenizer.apply_chat_template(options.pop("messages"), chat_template=source, tokenize=False, **options)
    except Exception:
        return "raises"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def main() -> None:
    """Render every template with every conversation."""
    chat_template_utils.datetime = Clock
    tokenizer = transformers.PreTrainedTokenizerBase(**chat_cases.TOKENS)
    golden = {"transformers": transformers.__version__, "texts": {}}
    for path in sorted(Path(sys.argv[1]).glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        texts = {name: rendered(tokenizer, source, case) for name, case in chat_cases.CASES.items()}
        golden["texts"][path.name] = texts
    GOLDEN.write_text(json.dumps(golden, indent=0) + "\n")


if __name__ == "__main__":
    main()
