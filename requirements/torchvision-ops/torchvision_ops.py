"""Makes `import torchvision` work where its compiled part is a CUDA build and torch is CPU-only.

The package index carries only CUDA builds of torchvision. Beside a CPU-only torch its extension cannot load, and its Python part then registers fakes for two
operators that have no schema, which raises. Here, on the first import of torchvision and not before, the extension is tried; where it does not load, the two
schemas are declared. Where it loads (a CPU build, or CUDA torch) nothing is changed. Interpreter start costs one entry in `sys.meta_path`.
"""

import sys

_keep = []  # torch.library.Library objects must outlive their definitions


def _prepare(folder):
    import glob
    import os

    import torch

    if torch.version.cuda is not None:
        return
    for extension in glob.glob(os.path.join(folder, "_C*.so")):
        try:
            torch.ops.load_library(extension)
            return
        except OSError:
            pass
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep.append(library)


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None and spec.submodule_search_locations:
            folder, execute = spec.submodule_search_locations[0], spec.loader.exec_module

            def exec_module(module):
                _prepare(folder)
                execute(module)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder)
