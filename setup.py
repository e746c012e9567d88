"""Builds pyfused._C by calling CMake: CMakeLists.txt says how, pyproject.toml what.

CMAKE_ARGS passes options through, e.g. CMAKE_ARGS="-DPYFUSED_CUDA=OFF" pip install .
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        temp = Path(self.build_temp).resolve()
        configure = [
            # --fresh: a cache left by an earlier isolated build names a Python and a ninja that are gone.
            *["cmake", "--fresh", "-S", str(Path(__file__).resolve().parent), "-B", str(temp), "-G", "Ninja"],
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYFUSED_VERSION={self.distribution.get_version()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(temp)], check=True)


setup(
    # bench/ stays at the top level of the repository and is installed as pyfused.bench.
    packages=[*find_packages(include=["pyfused", "pyfused.*"]), "pyfused.bench"],
    package_dir={"pyfused.bench": "bench"},
    ext_modules=[Extension("pyfused._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
