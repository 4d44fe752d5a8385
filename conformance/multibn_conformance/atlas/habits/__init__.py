"""What the subject protocol cannot see of a framework's BatchNorm: flags, modes, layouts, names. One file for each framework.

A function is a question, its docstring the words of it, and what it returns is what was found; what it raises is told too.
``ask.py`` runs a file in an interpreter that has the framework; a file needs NumPy and the framework only, and ``gradient.py``.
"""
