"""Every figure, drawn from saved numbers. Nothing is computed here but positions on paper.

Drawing leaves matplotlib's global state (backend, rcParams, pyplot's figures) unchanged.
"""
