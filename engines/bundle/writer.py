"""Making a bundle, and adding to one: whole or not at all. What a bundle is: reader.py."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from earlytom.errors import BundleError
from earlytom.files import replacing, sync
from earlytom.parity.results import HopReport

from ..paths import make_directories, named_path, remove_directories
from .manifest import DIGEST_KEY, MANIFEST, MODEL, EngineRecord, Manifest, check_files
from .reader import Bundle, digest_file, read_bundle


class BundleWriter:
    """Writes a bundle beside its final place and renames it there: `output` is the old thing or the new, never half.

        with BundleWriter(output) as writer:
            ...                                # make files in writer.path
            bundle = writer.commit(manifest)   # hashes them, writes the manifest, renames

    An existing directory is refused unless it is empty, or force is set and it is an earlier bundle with nothing of
    somebody else in it. Leaving without `commit`, by an exception or by Ctrl-C removes everything, parent directories
    made on the way included. SIGTERM and SIGHUP end a process without unwinding it; a program that wants the same for
    them raises from a handler: `signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))`. What a killed process leaves
    is named `.<output>.<random>.partial` (a long name is cut), and never taken for a bundle. Raises BundleError.
    """

    def __init__(self, output: Path | str, *, force: bool = False) -> None:
        self.output = named_path(output, "the output")
        self.force = force
        # A name may be as long as the file system allows, which leaves no room for more.
        hidden = f".{self.output.name.encode()[:200].decode(errors='ignore')}.{secrets.token_hex(4)}"
        self.path = self.output.parent / f"{hidden}.partial"
        self._displaced = self.output.parent / f"{hidden}.old"
        self._created: list[Path] = []

    def __enter__(self) -> BundleWriter:
        _check_replaceable(self.output, self.force)
        parent = self.output.parent
        try:
            make_directories(parent, self._created)
            self.path.mkdir()
            with suppress(FileNotFoundError):
                self.output.lstat()  # finds a name that is too long, before the work
        except OSError as error:
            self._clean()
            long = error.errno == errno.ENAMETOOLONG
            why = error.strerror if long else f"{parent} is not writable ({error.strerror})"
            raise BundleError(f"{self.output} cannot be made: {why}") from None
        except BaseException:
            self._clean()
            raise
        return self

    def commit(self, manifest: Manifest) -> Bundle:
        """Hash what lies in `path`, add it to `manifest`, write that, and move the directory to its place.

        What running an engine left there (kernels compiled on this card, *.cache) is removed first: later loads rewrite
        it, and the same export is to give the same bundle on every machine.
        """
        files = {}
        for entry in sorted(self.path.iterdir()):
            if entry.suffix == ".cache":
                entry.unlink()
                continue
            if entry.is_symlink() or not entry.is_file():
                raise BundleError(f"{entry} is not a plain file: a bundle holds nothing else")
            files[entry.name] = digest_file(entry)
            sync(entry)
        manifest = replace(manifest, files=files)
        _write_manifest(self.path, manifest)
        sync(self.path)
        _check_replaceable(self.output, self.force)  # again: an export takes minutes
        if self.output.exists():
            os.rename(self.output, self._displaced)
        os.rename(self.path, self.output)  # when this fails, _clean puts the old one back
        sync(self.output.parent)
        return Bundle(self.output, manifest)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._clean()
        cause: BaseException | None = error
        while cause is not None and isinstance(error, Exception) and not isinstance(error, BundleError):
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise BundleError(
                    f"the bundle {self.output} could not be written: the disk is full ({cause.strerror}); free some "
                    "space or choose another output directory"
                ) from error
            ours = (str(self.path), str(self.output))
            if cause is error and isinstance(cause, OSError) and str(cause.filename or "").startswith(ours):
                raise BundleError(f"the bundle {self.output} could not be written: {cause.strerror}") from error
            cause = cause.__cause__ or cause.__context__

    def _clean(self) -> None:
        if os.path.lexists(self._displaced):
            if self.output.exists():
                shutil.rmtree(self._displaced, ignore_errors=True)
            else:
                os.rename(self._displaced, self.output)
        shutil.rmtree(self.path, ignore_errors=True)
        remove_directories(self._created)


def update_bundle(
    bundle: Bundle, *, add: Mapping[str, Path | bytes] | None = None, engines: Sequence[EngineRecord] = (),
    parity: Sequence[HopReport] | None = None,
) -> Bundle:
    """Add files and engines to a bundle, or give it new parity results; the bundle as it then is.

    add: name -> file to copy, or content; engines: records, each in place of one with the same file; parity: takes the
    place of all earlier results. At every moment the directory is a valid bundle: files are put in place before the
    manifest that lists them, and one that is replaced is first taken out of the manifest. Two updates at once wait for
    each other (where flock works). The graph itself cannot be replaced. Raises BundleError.
    """
    path, add = bundle.path, dict(add or {})
    if {MODEL, f"{MODEL}.data"} & add.keys():
        raise BundleError(f"the graph of the bundle {path} cannot be replaced, its engines come from it: export again")
    temporary = {name: path / f".{secrets.token_hex(4)}.tmp" for name in add}
    with _locked(path):
        manifest = read_bundle(path, check=False).manifest
        try:
            records = {}
            for name, source in add.items():
                if isinstance(source, bytes):
                    temporary[name].write_bytes(source)
                else:
                    shutil.copyfile(source, temporary[name])
                sync(temporary[name])
                records[name] = digest_file(temporary[name])
            final = replace(
                manifest,
                files=manifest.files | records,
                engines=_without(manifest, {e.file for e in engines}).engines + tuple(engines),
                parity=manifest.parity if parity is None else tuple(parity),
            )
            check_files(final)
            if add.keys() & manifest.files.keys():
                _write_manifest(path, _without(manifest, set(add)))
            for name, file in temporary.items():
                os.replace(file, path / name)
            _write_manifest(path, final)
        except OSError as error:
            raise BundleError(f"the bundle {path} could not be updated: {error.filename}: {error.strerror}") from error
        finally:
            for file in temporary.values():
                file.unlink(missing_ok=True)
    return Bundle(path, final)


def _without(manifest: Manifest, names: set[str]) -> Manifest:
    files = {name: record for name, record in manifest.files.items() if name not in names}
    return replace(manifest, files=files, engines=tuple(e for e in manifest.engines if e.file not in names))


def _check_replaceable(output: Path, force: bool) -> None:
    """Raise BundleError unless a bundle may be put at `output` without harm to anybody's files."""
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        kind = "a file" if output.is_file() else "no directory"
        raise BundleError(f"the output {output} is {kind}: give a directory that does not exist yet")
    if os.path.ismount(output):
        raise BundleError(f"the output {output} is a mount point, which cannot be renamed: use {output / 'bundle'}")
    try:
        present = set(os.listdir(output))
    except OSError as error:
        raise BundleError(f"the output {output} cannot be read ({error.strerror})") from None
    if not present:
        return
    try:  # lenient: a damaged or newer bundle can be replaced as well
        known = json.loads((output / MANIFEST).read_bytes())
        listed = set(known["files"]) if DIGEST_KEY in known else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        listed = None
    if listed is None:
        raise BundleError(
            f"the output {output} is not empty and not an earlier bundle, so it is left alone: choose another directory"
        )
    if not force:
        raise BundleError(f"the output {output} holds a bundle already: --force replaces it")
    foreign = sorted(n for n in present - listed - {MANIFEST} if not n.endswith((".engine", ".cache", ".tmp")))
    if foreign:
        raise BundleError(
            f"the output {output} holds files of somebody else ({', '.join(foreign[:3])}): move them away first"
        )


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    with replacing(directory / MANIFEST) as temporary:
        temporary.write_text(manifest.to_json(), encoding="ascii", newline="\n")
    sync(directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        import fcntl  # not on Windows
        handle = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # some network file systems
            pass
        yield
    finally:
        os.close(handle)
