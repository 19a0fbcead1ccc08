"""A course on fine-tuning Stable Diffusion XL whose notebooks are this library.

    from sdxl_course import load_pipeline, generate, show_images
    show_images(generate(load_pipeline("tiny"), "a photo of a red house in the snow", seeds=range(4)))

What people use every day can be imported from here, as above; everything else from its own module, as in
`from sdxl_course.model.adapters import add_lora`. Importing this package imports nothing else: a name brings its
module when it is first asked for."""
import os
import sys

if sys.platform == "win32": os.environ.setdefault("FOR_DISABLE_CONSOLE_CTRL_HANDLER", "1") # else Fortran takes Ctrl-C

__version__ = "0.1.0"

NAMES = dict( # name -> module that defines it
    CourseError="core", show_images="core",
    sample_dir="world.samples",
    load_components="model.components", tiny_path="model.components", generate="model.sampling",
    check_dataset="data.check",
    load_pipeline="inference", set_lora_scale="model.lora_scales", sweep_lora_scale="inference",
    TextToImageConfig="text_to_image", train_text_to_image="text_to_image",
    DreamBoothConfig="dreambooth", train_dreambooth="dreambooth",
    EvaluateConfig="evaluate", evaluate_model="evaluate",
)
__all__ = [*NAMES, "__version__"]

if getattr(sys, "argv", [])[:1] == ["-m"] and "sdxl_course.cli" not in sys.orig_argv: # python -m sdxl_course.MODULE
    from .cli import quick_help
    if text := quick_help(sys.argv, sys.orig_argv):
        print(text, end="")
        sys.exit()

if "IPython" in sys.modules: # in a notebook, cells that take long wait until they are asked for
    from .slow_cells import watch_slow_cells
    watch_slow_cells()


def __getattr__(name):
    if name not in NAMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .cli import load_module
    return getattr(load_module(NAMES[name]), name)


def __dir__(): return sorted({*globals(), *NAMES})
