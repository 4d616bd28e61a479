"""`facet serve cpu-tier`: rows, by version."""

import click

from online.commands.serve_options import ADMIN_PORT, HOST, PORT, THREADS, VERSIONS, current_version, pins_of
from pipelines.contracts.workspace import Workspace

__all__ = ["cpu_tier"]


@click.command("cpu-tier")
@HOST
@PORT
@ADMIN_PORT
@VERSIONS
@THREADS
@click.option("--max-ids", type=click.IntRange(1), default=65_536, show_default=True, help="Most ids in one request.")
@click.option(
    "--rows", show_default="as feature_store.yaml says",
    help="Where the rows were materialized to: segments, or redis://HOST:PORT/DB, or unix://SOCKET.",
)
@click.pass_obj
def cpu_tier(
    workspace: Workspace, host: str, port: int, admin_port: int, versions: tuple[int, ...] | None, threads: int,
    max_ids: int, rows: str | None,
) -> None:
    """Serve rows of materialized versions, each request from one version.

    Every segment is hashed before it is served; of rows in Redis, every value when it is read. With several versions
    the first is preferred until `facet rollout` promotes another.
    """
    from online.cpu_tier import CpuTierAdminService, HostedVersions, LookupService
    from online.proto import admin_pb2_grpc, lookup_pb2_grpc
    from online.reader import VersionReader
    from online.server import Endpoint, serve_until_stopped

    endpoint, admin = Endpoint("lookup", host, port, threads), Endpoint("admin", host, admin_port, 2)
    hosted = HostedVersions(
        lambda version: VersionReader.open(workspace, version, rows=rows), pin=pins_of(workspace, "cpu-tier", endpoint)
    )
    wanted = versions or current_version(workspace)
    for version in wanted:
        hosted.load(version)
    hosted.promote(wanted[0])
    lookup_pb2_grpc.add_LookupServicer_to_server(LookupService(hosted, max_ids=max_ids), endpoint.server)
    admin_pb2_grpc.add_CpuTierAdminServicer_to_server(CpuTierAdminService(hosted), admin.server)
    serve_until_stopped([endpoint, admin], lambda: {"role": "cpu-tier", "versions": list(wanted)})
    hosted.close()
