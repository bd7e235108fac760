"""Look at models and at what runs wrote: entropy, resuscitation, acquisition, figures."""

from importlib.util import find_spec
from os import path


def _import_olmo() -> None:
    """Raise ImportError of one line where the package olmo that Python finds is not ours, or not complete.

    It has the name of this package: `python -m analysis.entropy` then prints the line alone. The remedy is that of
    olmo/files/neighbour.py, which may be missing or another project's.
    """
    spec = find_spec("olmo")
    folder = path.abspath(next(iter((spec and spec.submodule_search_locations) or ["olmo"])))
    if spec is None or spec.origin is None or not path.exists(path.join(folder, "files", "neighbour.py")):
        raise ImportError(
            f"{folder}: not knowledge-entropy's package olmo, or not all of it; ai2-olmo has one of this name too; "
            "run: pip uninstall ai2-olmo knowledge-entropy; then install knowledge-entropy again, and ai2-olmo in "
            "another environment",
            name=__name__,
        )
    try:
        import olmo  # noqa: F401
    except ImportError as error:
        raise ImportError(str(error), name=__name__) from None


_import_olmo()
