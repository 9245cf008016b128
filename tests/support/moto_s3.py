"""A local S3 server (moto's). While it runs, the environment's S3 settings name it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "bucket"


@dataclass(frozen=True)
class S3:
    """The server at `url`, with one bucket."""

    url: str

    def upload(self, folder: Path, prefix: str) -> str:
        """Uploads the folder's files under `prefix`; returns the URI."""
        client = boto3.client("s3")
        for file in folder.iterdir():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{file.name}", Body=file.read_bytes())
        client.close()
        return f"s3://{BUCKET}/{prefix}"

    def remove(self, prefix: str) -> None:
        """Removes all objects under `prefix`."""
        client = boto3.client("s3")
        for found in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ()):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])
        client.close()


@contextmanager
def s3_server() -> Iterator[S3]:
    """Ends the server, and restores the environment, with the context."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    own = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, own):
            client = boto3.client("s3")
            client.create_bucket(Bucket=BUCKET)
            client.close()
            yield S3(url)
    finally:
        server.stop()
        server._server.server_close()
