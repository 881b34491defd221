"""Builds the library of C++ kernels, as a hook of hatchling or by hand.

    python hatch_build.py            builds src/bitgen/kernels/_native.so (.dylib, .dll) in place

Every `*.cpp` in src/bitgen/kernels/native is compiled and linked to one shared library, which is
loaded by ctypes: no Python headers, one library for all versions of Python. A file whose name ends
in the name of an instruction set (`_avx2.cpp`, see INSTRUCTION_SETS) is compiled with its flags,
and left out where architecture or compiler do not have it; all files see BITGEN_HAVE_AVX2 and the
like for those that are in.

Without a compiler, or when it fails, the install goes on without the library: BitGen then runs on
PyTorch. The variable CXX names another compiler; BITGEN_NATIVE=0 leaves the library out,
BITGEN_NATIVE=1 turns a failure into an error.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # by hand, without hatchling
    BuildHookInterface = object  # type: ignore[assignment, misc]

NATIVE = Path("src/bitgen/kernels/native")
LIBRARY_STEM = Path("src/bitgen/kernels/_native")
OBJECTS = Path("build/native")
SOURCE_SUFFIXES = (".cpp", ".h", ".inc")


@dataclass(frozen=True)
class InstructionSet:
    """One kind of file: its architecture and the flags of GCC and Clang, and of MSVC."""

    architecture: str
    flags: tuple[str, ...]
    msvc_flags: tuple[str, ...] = ()


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
INSTRUCTION_SETS = {
    "avx2": InstructionSet("x86_64", _AVX2, ("/arch:AVX2",)),
    "avxvnni": InstructionSet("x86_64", (*_AVX2, "-mavxvnni"), ("/arch:AVX2",)),
    "avx512": InstructionSet(
        "x86_64",
        (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni",
         "-mprefer-vector-width=512"),
        ("/arch:AVX512",),
    ),
    "neon": InstructionSet("aarch64", ("-march=armv8.2-a+dotprod",)),
}  # fmt: skip
_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


class BuildFailed(RuntimeError):
    """The library cannot be built here; the message says why."""


class Compiler:
    """GCC or Clang. Commands are lists of arguments."""

    object_suffix = ".o"

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.environment: dict[str, str] | None = None
        self.architecture = self._target_architecture()
        self.target_flags: list[str] = []
        if sys.platform == "darwin":
            self.target_flags = [
                "-arch", _apple_architecture(), f"-mmacosx-version-min={_macos_version()}"
            ]  # fmt: skip

    def _target_architecture(self) -> str:
        if sys.platform == "darwin":
            return _plain_architecture(_apple_architecture())
        done = subprocess.run(
            [*self.command, "-dumpmachine"], capture_output=True, text=True, check=False
        )
        return _plain_architecture(done.stdout.strip().partition("-")[0] or platform.machine())

    def flags(self, instruction_set: InstructionSet | None) -> list[str]:
        """All flags of a compilation."""
        extra = [] if instruction_set is None else list(instruction_set.flags)
        # Without contraction x * y + z rounds twice, as in PyTorch, unless the source says fma.
        return [
            "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fno-math-errno",
            "-ffp-contract=off", "-Wall", "-Wextra", "-pthread", *self.target_flags, *extra,
        ]  # fmt: skip

    def compile(self, source: Path, target: Path, flags: list[str], defines: list[str]) -> None:
        """Compile one file. Raises BuildFailed with what the compiler says."""
        self._run([*self.command, *flags, *(f"-D{name}" for name in defines), "-c", str(source),
                   "-o", str(target)])  # fmt: skip

    def link(self, objects: list[Path], target: Path) -> None:
        """Link a shared library. Raises BuildFailed."""
        kind = "-dynamiclib" if sys.platform == "darwin" else "-shared"
        self._run([*self.command, kind, "-pthread", *self.target_flags, *map(str, objects),
                   "-o", str(target)])  # fmt: skip

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=self.environment
        )
        if done.returncode:
            raise BuildFailed(f"{shlex.join(command)}\n{done.stdout}{done.stderr}".strip())
        if done.stderr.strip():
            print(done.stderr, file=sys.stderr)


class MicrosoftCompiler(Compiler):
    """cl.exe, with the environment that Visual Studio sets up for it."""

    object_suffix = ".obj"

    def __init__(self, command: list[str], environment: dict[str, str] | None) -> None:
        self.command = command
        self.environment = environment
        self.architecture = _plain_architecture(platform.machine())

    def flags(self, instruction_set: InstructionSet | None) -> list[str]:
        extra = [] if instruction_set is None else list(instruction_set.msvc_flags)
        return ["/nologo", "/std:c++17", "/O2", "/DNDEBUG", "/EHsc", "/MD", "/W3", *extra]

    def compile(self, source: Path, target: Path, flags: list[str], defines: list[str]) -> None:
        self._run([*self.command, *flags, *(f"/D{name}" for name in defines), "/c", str(source),
                   f"/Fo{target}"])  # fmt: skip

    def link(self, objects: list[Path], target: Path) -> None:
        self._run([*self.command, "/nologo", "/LD", "/MD", *map(str, objects), f"/Fe{target}"])


def _plain_architecture(name: str) -> str:
    return _ARCHITECTURES.get(name.lower(), name.lower())


def _apple_architecture() -> str:
    """What cibuildwheel asks for, else this machine."""
    asked = re.findall(r"-arch\s+(\S+)", os.environ.get("ARCHFLAGS", ""))
    return asked[0] if len(asked) == 1 else platform.machine()


def _macos_version() -> str:
    oldest = "11.0" if _apple_architecture() == "arm64" else "10.13"
    return os.environ.get("MACOSX_DEPLOYMENT_TARGET") or oldest


def find_compiler() -> Compiler:
    """The compiler that CXX names, else the system's. Raises BuildFailed if there is none."""
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named, posix=os.name == "posix")
        if not command or shutil.which(command[0]) is None:
            raise BuildFailed(f"CXX names {named!r}, which is not there.")
        if Path(command[0]).stem.lower() in ("cl", "clang-cl"):
            return MicrosoftCompiler(command, None)
        return Compiler(command)
    if sys.platform == "win32":
        return _find_microsoft_compiler()
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return Compiler([found])
    raise BuildFailed("There is no C++ compiler (c++, g++, clang++) in PATH.")


def _find_microsoft_compiler() -> Compiler:
    if found := shutil.which("cl"):
        return MicrosoftCompiler([found], None)
    programs = os.environ.get("PROGRAMFILES(X86)", r"C:\Program Files (x86)")
    vswhere = Path(programs, "Microsoft Visual Studio", "Installer", "vswhere.exe")
    is_arm = _plain_architecture(platform.machine()) == "aarch64"
    component = "ARM64" if is_arm else "x86.x64"
    if vswhere.is_file():
        place = subprocess.run(
            [str(vswhere), "-latest", "-products", "*", "-property", "installationPath",
             "-requires", f"Microsoft.VisualStudio.Component.VC.Tools.{component}"],
            capture_output=True, text=True, check=False,
        ).stdout.strip()  # fmt: skip
        batch = Path(place, "VC", "Auxiliary", "Build", "vcvarsall.bat")
        if place and batch.is_file():
            listing = subprocess.run(
                f'cmd /u /c ""{batch}" {"arm64" if is_arm else "x64"} >nul && set"',
                capture_output=True, check=False,
            ).stdout.decode("utf-16-le", errors="replace")  # fmt: skip
            pairs = (line.split("=", 1) for line in listing.splitlines() if "=" in line[1:])
            environment = {name.upper(): value for name, value in pairs}
            if found := shutil.which("cl", path=environment.get("PATH")):
                return MicrosoftCompiler([found], environment)
    raise BuildFailed("There is no Microsoft C++ compiler (Visual Studio or its build tools).")


def source_hash(native: Path) -> str:
    """Identifies the sources; `bitgen.kernels.library` computes the same."""
    digest = hashlib.sha256()
    for path in sorted(native.iterdir()):
        if path.suffix in SOURCE_SUFFIXES:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def library_path(root: Path) -> Path:
    """Where the library of this system lies."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return root / LIBRARY_STEM.with_suffix(suffix)


def build(root: Path, force: bool = False) -> tuple[Path, str]:
    """Build the library in place.

    Args:
        root: the checkout.
        force: compile again what is there already.

    Returns:
        The library and one sentence on what was done.

    Raises:
        BuildFailed: no compiler, or it failed.
    """
    native, library = root / NATIVE, library_path(root)
    compiler = find_compiler()
    built = _present_sets(compiler)
    defines = [f"BITGEN_HAVE_{name.upper()}" for name in built]
    identity = source_hash(native)
    headers = hashlib.sha256(
        b"".join(p.read_bytes() for p in sorted(native.iterdir()) if p.suffix in (".h", ".inc"))
    )
    objects_dir = root / OBJECTS
    objects_dir.mkdir(parents=True, exist_ok=True)
    objects: list[Path] = []
    waiting: list[tuple[Path, Path, list[str], list[str]]] = []
    for source in sorted(native.glob("*.cpp")):
        kind = source.stem.rpartition("_")[2]
        if kind in INSTRUCTION_SETS and kind not in built:
            continue
        text = source.read_bytes()
        flags = compiler.flags(INSTRUCTION_SETS.get(kind))
        own = [*defines]
        if b"BITGEN_SOURCE_HASH" in text:
            own.append(f'BITGEN_SOURCE_HASH="{identity}"')
        key = headers.copy()
        key.update(text + repr((compiler.command, flags, own)).encode())
        target = objects_dir / f"{source.stem}-{key.hexdigest()[:16]}{compiler.object_suffix}"
        objects.append(target)
        if force or not target.is_file():
            waiting.append((source, target, flags, own))
    # Objects have names of their content, so this is what the library was linked from.
    record = objects_dir / "linked.txt"
    contents = "\n".join(path.name for path in objects)
    if not waiting and library.is_file() and record.is_file() and record.read_text() == contents:
        return library, f"{library.name} is up to date."

    def compile_one(job: tuple[Path, Path, list[str], list[str]]) -> None:
        source, target, flags, own = job
        # A build that is killed leaves no half object under a name that counts.
        unfinished = target.with_name(f"{os.getpid()}-{target.name}")
        compiler.compile(source, unfinished, flags, own)
        os.replace(unfinished, target)

    with concurrent.futures.ThreadPoolExecutor(_parallel_jobs()) as pool:
        list(pool.map(compile_one, waiting))
    # A process that has the old library open keeps it: the new one is another file.
    unfinished = library.with_name(f"{os.getpid()}-{library.name}")
    try:
        compiler.link(objects, unfinished)
        os.replace(unfinished, library)
    finally:
        unfinished.unlink(missing_ok=True)
    record.write_text(contents)
    for path in objects_dir.iterdir():
        if path not in objects and path != record:
            path.unlink(missing_ok=True)
    sets = f" with {', '.join(built)}" if built else ""
    return library, (
        f"Built {library.name} by {Path(compiler.command[0]).name} for {compiler.architecture}"
        f"{sets}: {len(waiting)} of {len(objects)} files compiled."
    )


def _present_sets(compiler: Compiler) -> list[str]:
    """The instruction sets that this compiler and its target have."""
    present = []
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty.cpp")
        empty.write_text("int bitgen_empty;\n")
        target = empty.with_suffix(compiler.object_suffix)
        for name, instruction_set in INSTRUCTION_SETS.items():
            if instruction_set.architecture == compiler.architecture:
                with contextlib.suppress(BuildFailed):
                    compiler.compile(empty, target, compiler.flags(instruction_set), [])
                    present.append(name)
    return present


def _parallel_jobs() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wheel_tag() -> str:
    """The tag of a wheel with the library: any Python 3, this platform."""
    if sys.platform == "darwin":
        name = f"macosx-{_macos_version()}-{_apple_architecture()}"
    else:
        name = sysconfig.get_platform()
    return f"py3-none-{re.sub(r'[-.]', '_', name)}"


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg, misc]
    """Puts the library into the wheel and gives the wheel its platform's tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel, also an editable one, is made."""
        choice = os.environ.get("BITGEN_NATIVE", "")
        if choice == "0":
            return
        root = Path(self.root)
        try:
            library, sentence = build(root)
        except (BuildFailed, OSError) as error:
            if choice == "1":
                raise
            self.app.display_warning(
                f"BitGen is installed without its C++ kernels and will run on PyTorch: {error}"
            )
            return
        self.app.display_info(sentence)
        build_data["pure_python"] = False
        build_data["tag"] = wheel_tag()
        build_data["artifacts"].append(library.relative_to(root).as_posix())


def main() -> int:
    """Build in place and say what was done."""
    try:
        _, sentence = build(Path(__file__).resolve().parent, force="--force" in sys.argv[1:])
    except BuildFailed as error:
        print(f"Not built: {error}", file=sys.stderr)
        return 1
    print(sentence)
    return 0


if __name__ == "__main__":
    sys.exit(main())
