"""Print docs/config.md: python -m olmo.config > docs/config.md"""

from .help import markdown

if __name__ == "__main__":
    print(markdown(), end="")
