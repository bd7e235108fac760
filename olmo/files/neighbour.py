"""Importing this raises ImportError if the folder of the package olmo has files of ai2-olmo too.

Both projects have a package of this name. Where both are installed in one environment, pip has overwritten files of one
with those of the other. Whichever came last, this module is imported first: by our olmo/__init__.py, or by our
olmo/config, which ai2-olmo's olmo/__init__.py imports in place of its own olmo/config.py.
"""

import os

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if os.path.lexists(os.path.join(_PACKAGE, "config.py")):  # all versions of ai2-olmo have it; ours is a folder
    raise ImportError(
        f"{_PACKAGE}: has files of both knowledge-entropy and ai2-olmo, which overwrite each other; run: pip uninstall "
        "ai2-olmo knowledge-entropy; then install knowledge-entropy again, and ai2-olmo in another environment",
        name="olmo",
    )
