"""Builds the phantom's libraries for one torch: python build.py TORCH_LIB_FOLDER OUT_FOLDER

Which symbols there must be, in which library and under which version, is read from torch's own binaries. Each symbol
gets a weak function that returns 0; the C++ files beside this one override those that have to do more. Needs g++ and
readelf. OUT_FOLDER/lib then holds the libraries, OUT_FOLDER/cuda-home a compiler that only tells its version, for
DeepSpeed, which asks.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
CARD = "libphantomcard.so"
NVCC = "#!/bin/sh\necho 'Cuda compilation tools, release 12.6, V12.6.85'\n"
FLAGS = ("-O1", "-fPIC", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-unused-variable")
STUB = 'extern "C" __attribute__((weak, visibility("default"))) long {name}() {{ return 0; }}\n'


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's libraries, as far as torch needs it."""

    soname: str
    sources: tuple[str, ...] = ()
    define: str = "PLAIN"
    symbols: str = ""
    """Pattern of its symbols' names, where they carry no version that names the library."""
    by_name: tuple[str, ...] = field(default=(), repr=False)
    """Symbols that torch looks up while it runs, so that its binaries do not list them."""


DRIVER_BY_NAME = tuple(
    """
    cuDeviceGetAttribute cuGetErrorString cuMemAddressFree cuMemAddressReserve cuMemCreate cuMemExportToShareableHandle
    cuMemGetAllocationGranularity cuMemImportFromShareableHandle cuMemMap cuMemRelease cuMemSetAccess cuMemUnmap
    cuMemsetD32Async cuMulticastAddDevice cuMulticastBindMem cuMulticastCreate cuMulticastUnbind cuStreamWriteValue32
    cuStreamWaitValue32 cuMemRetainAllocationHandle cuCtxPushCurrent cuCtxPopCurrent cuMemGetAddressRange
    cuMemGetHandleForAddressRange""".split()
)
LIBRARIES = (
    Library("libcudart.so.12", ("runtime.cpp", "kernels.cpp")),
    Library("libcublas.so.12", ("libraries.cpp",), "LIB_CUBLAS"),
    Library("libcublasLt.so.12", ("libraries.cpp",), "LIB_CUBLASLT"),
    Library("libcudnn.so.9", ("cudnn.cpp",)),
    Library("libcufft.so.11"),
    Library("libcupti.so.12", ("libraries.cpp",), "LIB_CUPTI"),
    Library("libcusolver.so.11", ("libraries.cpp",), "LIB_CUSOLVER"),
    Library("libcusparse.so.12", ("libraries.cpp",), "LIB_CUSPARSE"),
    Library("libnvrtc.so.12", ("libraries.cpp",), "LIB_NVRTC"),
    Library("libcurand.so.10", symbols="curand"),
    Library("libcufile.so.0", symbols="cuFile"),
    Library("libcusparseLt.so.0", symbols="cusparseLt"),
    Library("libnccl.so.2", ("nccl.cpp",), symbols="p?nccl"),
    Library("libcuda.so.1", ("driver.cpp",), symbols="cu(?!File)", by_name=DRIVER_BY_NAME),
    Library("libnvidia-ml.so.1", ("nvml.cpp",), symbols="nvml"),
)


def fingerprint() -> str:
    """Changes when the phantom's sources do."""
    sources = sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".h") or path.name == "build.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def undefined_symbols(torch_lib: Path) -> Iterator[tuple[str, str]]:
    """(name, version) of every symbol that torch's binaries want from elsewhere; the version may be empty."""
    for binary in sorted(torch_lib.glob("*.so*")):
        command = ["readelf", "-W", "--dyn-syms", str(binary)]
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
            fields = line.split()
            if len(fields) >= 8 and fields[6] == "UND":
                name, _, version = fields[7].partition("@")
                yield name, version.lstrip("@")


def build(torch_lib: Path, out: Path) -> None:
    """Make OUT/lib and OUT/cuda-home for the torch whose binaries are in torch_lib."""
    lib, generated, nvcc = out / "lib", out / "generated", out / "cuda-home" / "bin" / "nvcc"
    for folder in (lib, generated, nvcc.parent):
        folder.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    wanted = set(undefined_symbols(torch_lib))
    compile_shared(lib / CARD, HERE / "card.cpp")
    for library in LIBRARIES:
        names = {name for name, version in wanted if version == library.soname} | set(library.by_name)
        if library.symbols:
            names |= {n for n, version in wanted if not version and re.match(f"{library.symbols}[A-Z]", n)}
        stubs = generated / f"{library.soname}.cpp"
        stubs.write_text("".join(STUB.format(name=name) for name in sorted(names)))
        sources = [stubs, *(HERE / source for source in library.sources)]
        options = [f"-D{library.define}", f"-I{HERE}", f"-L{lib}", "-lphantomcard", "-Wl,-rpath,$ORIGIN"]
        if not library.symbols:  # torch asks for these under the library's own version
            script = generated / f"{library.soname}.map"
            script.write_text(f"{library.soname} {{ global: *; }};\n")
            options.append(f"-Wl,--version-script={script}")
        compile_shared(lib / library.soname, *sources, options=[*options, "-ldl", "-lpthread", "-lrt"])


def compile_shared(target: Path, *sources: Path, options: list[str] | None = None) -> None:
    """One shared library. Raises CalledProcessError where the compiler refuses."""
    command = ["g++", *FLAGS, "-shared", f"-Wl,-soname,{target.name}", *map(str, sources), "-o", str(target)]
    subprocess.run([*command, *(options or [])], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
