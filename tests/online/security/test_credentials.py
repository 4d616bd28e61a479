"""Who may talk to a server: TLS, mutual TLS, tokens, roles, limits; and that nothing secret is ever written down."""

import logging

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from online.commands.token import token
from online.proto import admin_pb2, admin_pb2_grpc, lookup_pb2, lookup_pb2_grpc
from online.rpc.channel import open_channel
from online.rpc.limits import Limits
from online.rpc.server import Endpoint
from online.rpc_error import Code, rpc_error_from
from online.security import watched
from online.security.credentials import ClientSecurity, ServerSecurity, is_loopback
from online.security.roles import Roles
from pipelines.contracts.errors import InvalidConfig
from tests.online.certificates import Authority
from tests.waiting import PATIENCE_S


class Answering(lookup_pb2_grpc.LookupServicer):
    def Lookup(self, request, context):
        return lookup_pb2.LookupResponse(version=7)


class AnsweringAdmin(admin_pb2_grpc.CpuTierAdminServicer):
    def Status(self, request, context):
        return admin_pb2.CpuTierStatus(preferred=7)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """CAs, certificates, tokens by name, and a roles file that knows them."""
    root = tmp_path_factory.mktemp("security")
    ca, stranger = Authority(root / "ca"), Authority(root / "stranger")
    made = {"root": root, "ca": ca, "stranger": stranger, "server": ca.issue("server")}
    made |= {name: ca.issue(name) for name in ("ranker-2", "unlisted")}
    made["ops"] = ca.issue("somebody", alternatives="DNS:ops.example")
    made["strange"] = stranger.issue("ranker-2")
    made["expired"] = ca.issue("ranker-2-expired", expired=True)
    roles = ""
    for name, role in [("ranker-1", "lookup"), ("scorer", "rank"), ("controller", "admin"), ("gone", "lookup")]:
        made[f"{name}.token"] = root / f"{name}.token"
        outcome = CliRunner().invoke(token, [name, "--role", role, "--out", str(root / f"{name}.token")])
        assert outcome.exit_code == 0 and (root / f"{name}.token").read_text().strip() not in outcome.output
        roles += outcome.output if name != "gone" else ""
    made["tokens"] = root / "tokens.yaml"
    made["tokens"].write_text(roles)
    made["roles"] = root / "roles.yaml"
    made["roles"].write_text(
        roles + "ranker-2: {certificate: ranker-2, roles: [lookup]}\nops: {certificate: ops.example, roles: [admin]}\n"
    )
    return made


@pytest.fixture
def serve():
    """Call with a `ServerSecurity`: the addresses of a lookup port and an admin port that have it."""
    endpoints = []

    def start(security, **limits):
        bounds = Limits(**limits)
        endpoints.extend(
            Endpoint(name, "127.0.0.1", 0, 4, security=security, limits=bounds) for name in ("lookup", "admin")
        )
        lookup, admin = endpoints[-2:]
        lookup_pb2_grpc.add_LookupServicer_to_server(Answering(), lookup.server)
        admin_pb2_grpc.add_CpuTierAdminServicer_to_server(AnsweringAdmin(), admin.server)
        for endpoint in (lookup, admin):
            endpoint.start()
        return f"127.0.0.1:{lookup.port}", f"127.0.0.1:{admin.port}"

    yield start
    for event in [endpoint.stop() for endpoint in endpoints]:
        assert event.wait(PATIENCE_S)


def outcome(address: str, client: ClientSecurity | None, *, admin: bool = False, **options) -> str:
    """"OK", or the facet-error of a refused call, or the gRPC status of one that got no further than the transport."""
    with open_channel(address, client) as channel:
        try:
            if admin:
                answer = admin_pb2_grpc.CpuTierAdminStub(channel).Status(
                    admin_pb2.StatusRequest(), timeout=PATIENCE_S, **options
                )
                assert answer.preferred == 7
            else:
                answer = lookup_pb2_grpc.LookupStub(channel).Lookup(
                    lookup_pb2.LookupRequest(), timeout=PATIENCE_S, **options
                )
                assert answer.version == 7
        except grpc.RpcError as error:
            metadata = dict(error.trailing_metadata() or ())
            return metadata.get("facet-error", error.code().name)
    return "OK"


def healthy(address: str, client: ClientSecurity | None) -> bool:
    with open_channel(address, client) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def services(address: str, client: ClientSecurity | None = None) -> set[str]:
    """What a reflection client is told."""
    with open_channel(address, client) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = stub.ServerReflectionInfo(asked, timeout=PATIENCE_S)
        return {service.name for service in answer.list_services_response.service}


def test_tls_and_mutual_tls_admit_whom_the_ca_signed(made, serve) -> None:
    server, ca = made["server"], made["ca"].certificate
    plain = ClientSecurity(ca)
    own, strange, expired = (
        ClientSecurity(ca, made[who].certificate, made[who].key) for who in ("unlisted", "strange", "expired")
    )
    tls, _ = serve(ServerSecurity(server.certificate, server.key))
    assert outcome(tls, plain) == "OK" and outcome(tls.replace("127.0.0.1", "localhost"), plain) == "OK"
    assert outcome(tls, None) == "UNAVAILABLE"  # plaintext
    assert outcome(tls, ClientSecurity(made["stranger"].certificate)) == "UNAVAILABLE"
    assert outcome(tls, ClientSecurity(ca, server_name="localhost")) == "OK"
    assert outcome(tls, ClientSecurity(ca, server_name="other.example")) == "UNAVAILABLE"
    mutual, _ = serve(ServerSecurity(server.certificate, server.key, ca))
    assert [outcome(mutual, client) for client in (own, plain, strange, expired)] == ["OK", *["UNAVAILABLE"] * 3]
    late, _ = serve(ServerSecurity(made["expired"].certificate, made["expired"].key))
    assert outcome(late, plain) == "UNAVAILABLE"


@pytest.mark.parametrize("encrypted", [True, False])
def test_tokens_have_roles(made, serve, encrypted) -> None:
    server = made["server"]
    ca = made["ca"].certificate if encrypted else None
    pair = (server.certificate, server.key) if encrypted else (None, None)
    lookup, admin = serve(ServerSecurity(*pair, roles=made["tokens"]))

    def client(name: str) -> ClientSecurity:
        return ClientSecurity(ca, token_file=made[f"{name}.token"])

    nobody = ClientSecurity(ca)
    assert outcome(lookup, client("ranker-1")) == "OK"
    assert outcome(lookup, client("scorer")) == "NOT_ALLOWED"
    assert outcome(lookup, client("controller")) == "NOT_ALLOWED"
    assert outcome(lookup, client("gone")) == "NOT_AUTHENTICATED"
    assert outcome(lookup, nobody) == "NOT_AUTHENTICATED"
    assert outcome(admin, client("ranker-1"), admin=True) == "NOT_ALLOWED"
    assert outcome(admin, client("controller"), admin=True) == "OK"
    secret = made["ranker-1.token"].read_text().strip()
    for value in (f"Basic {secret}", secret, "Bearer ", "Bearer", f"Bearer {secret}x"):
        assert outcome(lookup, nobody, metadata=(("authorization", value),)) == "NOT_AUTHENTICATED", value
    assert outcome(lookup, nobody, metadata=(("authorization", f"bearer {secret}"),)) == "OK"
    assert outcome(lookup, client("ranker-1"), metadata=(("authorization", "Bearer no"),)) == "NOT_AUTHENTICATED"
    assert healthy(lookup, nobody) and healthy(admin, nobody)
    with pytest.raises(grpc.RpcError) as caught:
        services(lookup, nobody)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # only where asked for


def test_certificates_have_roles(made, serve) -> None:
    server, ca = made["server"], made["ca"].certificate
    lookup, admin = serve(ServerSecurity(server.certificate, server.key, ca, made["roles"], reflection=True))

    def client(name: str, token: str | None = None) -> ClientSecurity:
        pair = made[name]
        return ClientSecurity(ca, pair.certificate, pair.key, token_file=made[f"{token}.token"] if token else None)

    assert outcome(lookup, client("ranker-2")) == "OK"  # by its common name
    assert outcome(admin, client("ranker-2"), admin=True) == "NOT_ALLOWED"
    assert outcome(admin, client("ops"), admin=True) == "OK"  # by an alternative name
    assert outcome(lookup, client("unlisted")) == "NOT_AUTHENTICATED"
    assert outcome(lookup, client("unlisted", token="ranker-1")) == "OK"
    assert outcome(admin, client("ranker-2", token="controller"), admin=True) == "OK"  # the roles of both
    assert outcome(lookup, client("ranker-2", token="gone")) == "NOT_AUTHENTICATED"
    assert healthy(lookup, client("unlisted"))
    assert "facet.v1.Lookup" in services(lookup, client("unlisted"))


def test_reflection_and_health_name_the_services(serve) -> None:
    lookup, admin = serve(None)
    health = "grpc.health.v1.Health"
    assert {"facet.v1.Lookup", health} <= services(lookup) and {"facet.v1.CpuTierAdmin", health} <= services(admin)
    with open_channel(lookup) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol="facet.v1.Lookup")])
        (answer,) = stub.ServerReflectionInfo(asked, timeout=PATIENCE_S)
        assert any(b"LookupRequest" in file for file in answer.file_descriptor_response.file_descriptor_proto)
        request = health_pb2.HealthCheckRequest(service="facet.v1.Lookup")
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_changed_files_come_into_effect_without_restart(made, serve, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(watched, "CHECK_S", 0.0)
    roles, pair = tmp_path / "roles.yaml", (tmp_path / "server.pem", tmp_path / "server.key")

    def install(server) -> None:
        for target, source in zip(pair, (server.certificate, server.key), strict=True):
            target.unlink(missing_ok=True)
            target.write_bytes(source.read_bytes())
            target.chmod(0o600)

    install(made["server"])
    roles.write_text(made["tokens"].read_text())
    lookup, _ = serve(ServerSecurity(*pair, roles=roles))
    client = ClientSecurity(made["ca"].certificate, token_file=made["ranker-1.token"])
    assert outcome(lookup, client) == "OK"
    roles.chmod(0o666)  # as it would be refused at the start
    assert outcome(lookup, client) == "NOT_AUTHENTICATED" and "mode 666" in caplog.text
    roles.chmod(0o600)
    assert outcome(lookup, client) == "OK"
    roles.write_text("{}")
    assert outcome(lookup, client) == "NOT_AUTHENTICATED"
    roles.write_text(made["tokens"].read_text())
    pair[1].write_bytes(made["strange"].key.read_bytes())  # half replaced
    assert outcome(lookup, client) == "OK" and "what was there before stays valid" in caplog.text
    install(made["strange"])  # a certificate of another CA
    assert outcome(lookup, client) == "UNAVAILABLE"
    assert outcome(lookup, ClientSecurity(made["stranger"].certificate, token_file=made["ranker-1.token"])) == "OK"


def open_to_all(path) -> None:
    path.chmod(0o644)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: ServerSecurity(m["server"].certificate), "both or neither"),
        (lambda m: ServerSecurity(m["root"] / "no.pem", m["server"].key), "No such file"),
        (lambda m: ServerSecurity(m["server"].certificate, m["ops"].key), "belong together"),
        (lambda m: ServerSecurity(m["tokens"], m["server"].key), "belong together"),
        (lambda m: ServerSecurity(client_ca=m["ca"].certificate), "certificate and key of the server"),
        (lambda m: ServerSecurity(m["server"].certificate, m["server"].key, m["tokens"]), "certificates as PEM"),
        (lambda m: ServerSecurity(roles=m["roles"]), "--tls-client-ca"),
        (lambda m: ClientSecurity(server_name="a"), "--tls-ca"),
        (lambda m: ClientSecurity(token_file=m["tokens"]), "chmod"),
        (lambda m: ClientSecurity(token_variable="FACET_TEST_TOKEN"), "at least 32"),
        (lambda m: open_channel("192.0.2.1:1", ClientSecurity(token_file=m["gone.token"])), "expected TLS"),
    ],
)
def test_wrong_files_are_refused_before_any_work(made, wrong, message, monkeypatch) -> None:
    monkeypatch.setenv("FACET_TEST_TOKEN", "too-short-a-token")
    made["tokens"].chmod(0o644)
    with pytest.raises(InvalidConfig, match=message) as caught:
        wrong(made)
    assert "too-short-a-token" not in str(caught.value)


def test_files_open_to_others_are_refused(made, tmp_path) -> None:
    key, roles = tmp_path / "key.pem", tmp_path / "roles.yaml"
    key.write_bytes(made["server"].key.read_bytes())
    key.chmod(0o644)
    with pytest.raises(InvalidConfig, match=r"mode 644.*chmod o-rwx"):
        ServerSecurity(made["server"].certificate, key)
    roles.write_text("{}")
    roles.chmod(0o666)
    with pytest.raises(InvalidConfig, match=r"mode 666.*chmod o-w"):
        ServerSecurity(roles=roles)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(made["ca"].certificate.read_bytes())
    ca.chmod(0o646)
    with pytest.raises(InvalidConfig, match=r"mode 646.*chmod o-w"):
        ServerSecurity(made["server"].certificate, made["server"].key, ca)
    with pytest.raises(InvalidConfig, match=r"mode 646.*chmod o-w"):
        ClientSecurity(ca)
    ca.chmod(0o644)
    ClientSecurity(ca)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {roles: [lookup]}", "neither"),
        ("a: {roles: [], certificate: a}", "none"),
        ("a: {roles: [root], certificate: a}", "root"),
        ("a: {roles: [lookup], token_sha256: secret-word}", "64 digits"),
        ("a: {roles: [lookup], certificate: a, password: b}", "unknown key"),
        ("a: {roles: [lookup], certificate: x}\nb: {roles: [rank], certificate: x}", r"shared by \['a', 'b'\]"),
        ("- a", "mapping"),
        ("secret-word", "mapping"),
        ("a: secret-word", "mapping"),
        ('a: "secret-word', "YAML"),
        ("a: {roles: [lookup], token_sha256: [secret-word]}", "text"),
        ("a: {roles: [lookup], secret-word: a}", "unknown key"),
        ("a: {secret-word: a}", "unknown key"),
        ("a: {token_sha256: secret-word}", "missing key"),
    ],
)
def test_roles_files_are_checked(tmp_path, text, message) -> None:
    path = tmp_path / "roles.yaml"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=message) as caught:
        Roles.read(path)
    assert "secret-word" not in str(caught.value)


def test_only_loopback_may_go_unencrypted(launch, workspace_with_versions, made) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")] == [True] * 5
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.0.2.1", "", "localhost.example"))
    workspace = workspace_with_versions.workspace
    for role in (["cpu-tier"], ["ranker", "--cpu-tier", "127.0.0.1:1"]):
        status, _, errors = launch(workspace, "serve", *role, "--host", "0.0.0.0").finish()
        assert status == 2 and "--plaintext" in errors, errors


def test_limits_are_kept(serve) -> None:
    address, _ = serve(None, request_bytes=1000, metadata_bytes=2000)
    with open_channel(address) as channel:
        stub = lookup_pb2_grpc.LookupStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Lookup(lookup_pb2.LookupRequest(request_id="x" * 2000), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert rpc_error_from(caught.value, address).code is Code.BATCH_TOO_LARGE
        with pytest.raises(grpc.RpcError) as caught:
            stub.Lookup(lookup_pb2.LookupRequest(), metadata=(("a", "x" * 3000),), timeout=PATIENCE_S)
        assert rpc_error_from(caught.value, address).code is Code.OVERLOADED
    with pytest.raises(InvalidConfig, match="streams=0"):
        Limits(streams=0)
    assert 8 * 1000 < Limits().for_ids(1000).request_bytes < 1 << 20




def test_connections_are_bounded(serve) -> None:
    address, _ = serve(None, connections=2)
    channels = [open_channel(address, own_connection=True) for _ in range(3)]
    stubs = [lookup_pb2_grpc.LookupStub(channel) for channel in channels]
    for stub in stubs[:2]:
        assert stub.Lookup(lookup_pb2.LookupRequest(), timeout=PATIENCE_S).version == 7
    with pytest.raises(grpc.RpcError) as caught:
        stubs[2].Lookup(lookup_pb2.LookupRequest(), timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    for channel in channels[:2]:
        channel.close()
    assert stubs[2].Lookup(lookup_pb2.LookupRequest(), timeout=PATIENCE_S, wait_for_ready=True).version == 7
    channels[2].close()


def test_text_of_callers_is_bounded_and_on_one_line(serve, caplog) -> None:
    class Failing(lookup_pb2_grpc.LookupServicer):
        def Lookup(self, request, context):
            raise ValueError

    endpoint = Endpoint("failing", "127.0.0.1", 0, 1)
    lookup_pb2_grpc.add_LookupServicer_to_server(Failing(), endpoint.server)
    endpoint.start()
    hostile = "\n12:00:00 online: all is well\x1b[2K\u202e" + "ж" * 100_000
    with caplog.at_level(logging.DEBUG), open_channel(f"127.0.0.1:{endpoint.port}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            lookup_pb2_grpc.LookupStub(channel).Lookup(lookup_pb2.LookupRequest(request_id=hostile), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.INTERNAL and len(caught.value.details()) < 2000
    assert endpoint.stop().wait(PATIENCE_S)
    (message,) = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert len(message) < 300 and message.isprintable()


@pytest.mark.slow
def test_a_rollout_over_mutual_tls_with_tokens_tells_nobody_a_secret(own_workspace, launch, made, monkeypatch) -> None:
    """CPU tier, ranker, traffic and rollouts as processes, at their most talkative."""
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    workspace, server, ca = own_workspace.workspace, made["server"], made["ca"].certificate

    def client(who: str, prefix: str = "") -> list:
        pair = made["unlisted"]
        tls = [f"--{prefix}tls-ca", ca, f"--{prefix}tls-certificate", pair.certificate, f"--{prefix}tls-key", pair.key]
        return [*tls, f"--{prefix}token-file", made[f"{who}.token"]]

    tls = ["--tls-certificate", server.certificate, "--tls-key", server.key, "--tls-client-ca", ca]
    serving = [*tls, "--roles", made["roles"], "--versions", "1", "--metrics-port", "0"]
    tier = launch(workspace, "-v", "serve", "cpu-tier", *serving).wait_ready()
    upstream = ["--cpu-tier", tier.port("lookup"), *client("ranker-1", "cpu-tier-")]
    ranker = launch(workspace, "-v", "serve", "ranker", *serving, *upstream).wait_ready()
    traffic = ["-v", "load", "--requests", "20", "--candidates", "4", "--version", "1", "--ranker", ranker.port("rank")]
    hosts = ["--cpu-tier", tier.port("admin"), "--ranker", ranker.port("admin")]
    runs = [
        (0, launch(workspace, *traffic, *client("scorer"))),
        (2, launch(workspace, "-v", "rollout", "--to", "2", *hosts, *client("ranker-1"))),
    ]
    ended = [(expected, *run.finish()) for expected, run in runs]
    ended.append((0, *launch(workspace, "-v", "rollout", "--to", "2", *hosts, *client("controller")).finish()))
    for expected, status, _, errors in ended:
        assert status == expected, errors
    assert "the role admin" in ended[1][3] and "is served everywhere" in ended[2][2]
    assert (ranker.stop(), tier.stop()) == (0, 0)
    said = "".join(out + errors for _, _, out, errors in ended) + tier.errors.read_text() + ranker.errors.read_text()
    assert "facet.v1.CpuTierAdmin/Promote by 'controller'" in said
    secrets = [made[f"{name}.token"].read_text().strip() for name in ("ranker-1", "scorer", "controller")]
    secrets += [line for pair in (server, made["unlisted"]) for line in pair.key.read_text().splitlines()[1:-1]]
    assert not [secret for secret in secrets if secret in said]
