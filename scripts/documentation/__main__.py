"""Print docs/commands.md: python -m scripts.documentation > docs/commands.md"""

from .commands import markdown

if __name__ == "__main__":
    print(markdown(), end="")
