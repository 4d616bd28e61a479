"""Who calls, and whether it may: known from a call's metadata and certificate, before its message is there."""

import grpc
import grpc.aio

from online.rpc_error import Code, RpcError
from online.security.credentials import ServerSecurity

__all__ = ["Gate"]


class Gate:
    """Admits callers that have a role.

    A caller has the roles of its token and of its certificate. A token that nobody has is refused even from somebody
    who shows a good certificate.

    Args:
        security: has a roles file.
        role: what a caller needs here.
    """

    def __init__(self, security: ServerSecurity, role: str) -> None:
        self._roles, self._role = security.watch_roles(), role

    def admit(self, context: grpc.aio.ServicerContext) -> str:
        """Name of the caller; raises `RpcError`: NOT_AUTHENTICATED or NOT_ALLOWED."""
        roles = self._roles.value()
        callers = roles.of_certificate(_certificate_names(context)) if roles.by_certificate else []
        for key, value in context.invocation_metadata():
            if key == "authorization":
                scheme, _, token = str(value).partition(" ")
                caller = roles.of_token(token.strip()) if scheme.lower() == "bearer" else None
                if caller is None:
                    raise _not_authenticated("one that is unknown here")
                callers.append(caller)
        if not callers:
            raise _not_authenticated("none")
        for caller in callers:
            if self._role in roles.identities[caller].roles:
                return caller
        raise RpcError(
            Code.NOT_ALLOWED, f"caller {', '.join(callers)}", expected=f"the role {self._role}",
            got=", ".join(sorted({role for caller in callers for role in roles.identities[caller].roles})),
            remedy="Use credentials that have it, or add it to the roles file.",
        )


def _not_authenticated(got: str) -> RpcError:
    return RpcError(
        Code.NOT_AUTHENTICATED, "credentials", expected="a bearer token or a client certificate of the roles file",
        got=got, remedy="Give the client --token-file, or a certificate and key.",
    )


def _certificate_names(context: grpc.aio.ServicerContext) -> list[str]:
    # gRPC gives these only of a certificate that it has verified.
    verified = context.auth_context()
    names = [*verified.get("x509_common_name", ()), *verified.get("x509_subject_alternative_name", ())]
    return [name.decode(errors="replace") for name in names]
