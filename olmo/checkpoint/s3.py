"""A folder on S3: objects whose keys begin alike, listed, read, written, uploaded, downloaded and deleted.

What boto3 raises becomes an OSError of one line that names the place. Credentials, profile (S3_PROFILE), region and
endpoint (AWS_ENDPOINT_URL, for other stores that speak S3) are found as boto3 finds them. `olmo/data/ranges.py` reads
byte ranges; here whole files are transferred, several at a time, large ones in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..exceptions import needs
from ..net import ATTEMPTS, WORKERS, describe_failure, s3_client

FILES = 4  # at a time, each in WORKERS / FILES parts at a time


class Refused(OSError):
    """A request that S3 refuses: these credentials lack a right, or the bucket does not exist."""


class RemoteFolder:
    """Objects under s3://BUCKET/PREFIX/, by their names below it.

    Every method raises an OSError that names the object if S3, after several attempts, does not answer as it should.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        needs("boto3", "s3", self.url)
        self._bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = s3_client("s3", ATTEMPTS, writes=True)

    def sizes(self, beginning: str = "") -> dict[str, int]:
        """Names that begin so, and their sizes in bytes."""
        found = self._listed("list_objects_v2", beginning, "Contents")
        return {item["Key"].removeprefix(self._prefix): item["Size"] for item in found}

    def read(self, name: str) -> bytes:
        with self._naming_errors(name):
            return self._client.get_object(**self._place(name))["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        with self._naming_errors(name):
            self._client.put_object(**self._place(name), Body=content)

    def upload(self, paths: Mapping[str, Path]) -> None:
        """Upload files under these names."""
        upload, parts = self._client.upload_file, _in_parts()
        self._each(lambda name: upload(str(paths[name]), **self._place(name), Config=parts), paths)

    def download(self, paths: Mapping[str, Path]) -> None:
        """Download these names to files, in folders that are made."""
        for folder in {path.parent for path in paths.values()}:
            folder.mkdir(parents=True, exist_ok=True)
        download, parts = self._client.download_file, _in_parts()
        self._each(lambda name: download(**self._place(name), Filename=str(paths[name]), Config=parts), paths)

    def delete(self, names: Iterable[str]) -> None:
        """Delete one by one: not every store deletes several at once."""
        self._each(lambda name: self._client.delete_object(**self._place(name)), names, WORKERS)

    def abort_uploads(self, beginning: str) -> None:
        """Discard the parts of large files whose upload was killed; no listing shows them, but they are paid for."""
        uploads = self._listed("list_multipart_uploads", beginning, "Uploads")
        with self._naming_errors():
            for upload in uploads:
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _listed(self, operation: str, beginning: str, kind: str) -> list[dict[str, Any]]:
        """What S3 lists of names that begin so: all items of one kind, of as many answers as they take."""
        with self._naming_errors():
            pages = self._client.get_paginator(operation).paginate(Bucket=self._bucket, Prefix=self._prefix + beginning)
            return [item for page in pages for item in page.get(kind, ())]

    def _each(self, work: Callable[[str], object], names: Iterable[str], workers: int = FILES) -> None:
        """Run `work` on all names, several at a time; the first error, which names its object, ends it."""

        def named(name: str) -> None:
            with self._naming_errors(name):
                work(name)

        pool = ThreadPoolExecutor(workers, "remote saves")
        try:
            for future in [pool.submit(named, name) for name in names]:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _place(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    @contextmanager
    def _naming_errors(self, name: str = "") -> Iterator[None]:
        """Turn what boto3 raises into an OSError of one line that names the object."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, ParamValidationError
        from botocore.exceptions import ConnectionError as NotConnected

        url = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            first: BaseException = error  # what boto3 wraps
            reasons = (ClientError, HTTPClientError, NotConnected)
            while not isinstance(first, reasons) and (cause := first.__cause__ or first.__context__):
                first = cause
            if isinstance(first, ClientError):
                status = first.response["ResponseMetadata"]["HTTPStatusCode"]
                code = first.response["Error"].get("Code", "")  # of an answer to HEAD the status again
                line = f"{url}: {status} {code.replace(str(status), '')}".rstrip()
                raise (Refused if 400 <= status < 500 else OSError)(line) from error
            if isinstance(first, ParamValidationError):
                raise Refused(f"{url}: {' '.join(str(first).split())}") from error
            passing = isinstance(first, (HTTPClientError, NotConnected, OSError))
            raise OSError(f"{url}: {describe_failure(first) if passing else ' '.join(str(first).split())}") from error


def _in_parts() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(max_concurrency=WORKERS // FILES)
