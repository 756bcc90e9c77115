"""`python bucket_emulator.py PORT`: gs://bucket in memory, on loopback.

The emulator of PyPI neither shows nor checks the generation of an object, which TensorStore needs where
it reads an index and writes it anew. Both are added here.
"""

import http
import sys

from gcp_storage_emulator.handlers import objects

_download, _insert = objects.download, objects.insert


def _generation(storage, bucket, name):
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except Exception:
        return "0"  # there is no such object


def download(request, response, storage, *rest, **options):
    names = request.params["bucket_name"], request.params["object_id"]
    response["x-goog-generation"] = _generation(storage, *names)
    _download(request, response, storage, *rest, **options)


def insert(request, response, storage, *rest, **options):
    wanted, name = (request.query.get(k, [""])[0] for k in ("ifGenerationMatch", "name"))
    if wanted and wanted != _generation(storage, request.params["bucket_name"], name):
        _ = request.data  # read from the socket
        response.status = http.HTTPStatus.PRECONDITION_FAILED
    else:
        _insert(request, response, storage, *rest, **options)


objects.download, objects.insert = download, insert

if __name__ == "__main__":
    from gcp_storage_emulator.server import create_server

    create_server("127.0.0.1", int(sys.argv[1]), True, "bucket").run()
