"""Hands the native module to CMake; everything else is in pyproject.toml and CMakeLists.txt.

Options go through the environment: ``CMAKE_ARGS="-DMTZ_CUDA=OFF" pip install .``
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = ["cmake", "-S", str(Path(__file__).parent.resolve()), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


# A top-level module, so that Python started in the repository root, where the folder mtz_ext hides an installed one,
# still finds what was built.
setup(ext_modules=[Extension("_mtz_ext", sources=[])], cmdclass={"build_ext": CMakeBuild})
