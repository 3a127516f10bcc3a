"""``python -m adaqn_cuda``: a diagnosis; with arguments, the demo's command line."""

import sys

from .diagnosis import report


def main() -> int:
    if len(sys.argv) == 1:
        print(report())
        return 0
    from .demo.cli import main as demo

    return demo(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
