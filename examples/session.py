"""Holds one conversation as a session and goes two ways from it: `python examples/session.py BUNDLE [PROMPT]`.

What a service does with sessions: feed text, choose tokens from the logits itself, take tokens back, go on in a fork, put a
session to disk and fetch it again, and stop a long prompt from another thread.
"""

import sys
import tempfile
import threading
from pathlib import Path

from galerne.errors import Cancelled
from galerne.runtime.model import Model
from galerne.runtime.session import Session
from galerne.runtime.tokenizer import Tokenizer


def write(session: Session, tokenizer: Tokenizer, count: int) -> str:
    """Go on greedily for `count` tokens."""
    stream, text = tokenizer.stream(), ""
    for _ in range(count):
        token = int(session.logits.argmax())  # a view of the engine's memory: sampling, masks and penalties are yours
        session.append([token])
        text += stream.push(token)
    return text + stream.finish()


def main() -> None:
    """Show each thing once."""
    bundle = Path(sys.argv[1])
    prompt = sys.argv[2] if len(sys.argv) > 2 else "def read_lines(path):\n"
    with Model.open(bundle) as model, tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.open(model.bundle)
        session = model.session()
        session.append(tokenizer.encode(prompt))

        # A fork shares the prompt's work; each goes on by itself, and in threads of their own both at once.
        other = session.fork()
        other.append(tokenizer.encode("    # ", special=False))
        print(f"one way:   {write(session, tokenizer, 12)!r}")
        print(f"another:   {write(other, tokenizer, 12)!r}")

        # Take the last tokens back and choose differently. `rewindable` says how far that goes.
        session.rewind(4)
        session.append(tokenizer.encode("return", special=False))
        print(f"rewound:   {write(session, tokenizer, 8)!r}")

        # To disk and back, in this process or the next.
        file = Path(folder) / "session"
        session.save(file)
        again = model.load_session(file)
        print(f"saved {file.stat().st_size} bytes; it goes on: {write(again, tokenizer, 8)!r}")

        # Stop a long prompt: between two chunks, from any thread. What was fed stays, and the session can be used.
        long_prompt = tokenizer.encode(prompt * 20_000)
        stopper = threading.Timer(0.2, session.cancel)
        stopper.start()
        try:
            session.append(long_prompt)
        except Cancelled as exc:
            print(exc)
        stopper.join()


if __name__ == "__main__":
    main()
