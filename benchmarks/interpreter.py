"""Triton's interpreter, in which kernels run where there is no GPU, in about half of its time."""

import dataclasses
import functools
import os


def hasten() -> None:
    """Leave out the two things on which the interpreter spends half of its time.

    It puts its own functions into the language in every call of a function inside a kernel: here once a launch. And it
    does every sum and product of integers again in 64 bits to see whether 32 were enough, which in calls as small as
    those of tests they are. Nothing happens where kernels are compiled.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_patch_lang"):  # another version, which may do it better
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()  # what functions of this launch see of the language

    @functools.cache
    def seen(function):
        values = function.__globals__.values()
        return any(value is language for value in values), any(value is language.core for value in values)

    def patch_once(function):
        if seen(function) in patched:
            return None
        patched.add(seen(function))
        return patch(function)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
