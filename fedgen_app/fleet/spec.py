"""The fleet file: which server, which devices. Read and checked whole before anything is written."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from fedgen_app.errors import SettingsError
from fedgen_app.federation.policy import bytes_of
from fedgen_app.fleet.certificates import is_address
from fedgen_app.settings import known_bits, read_toml

HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/+-]*[A-Za-z0-9._+-]")
TAKEN = ("server", "operator")  # folders beside those of the devices


def _host(value: str) -> str:
    if is_address(value):
        _without_scope(value)
        if ipaddress.ip_address(value).is_unspecified:
            raise PydanticCustomError("host", "should be an address that devices can reach, not the one to listen on")
        return value
    if not HOST.fullmatch(value) or value.replace(".", "").isdecimal():
        raise PydanticCustomError("host", "should be a host name or an IP address, without port and scheme")
    return value.lower()


def _without_scope(value: str) -> None:
    """Refuse ``fe80::1%eth0``: the scope means something on one machine alone, and takes any text."""
    if "%" in value:
        raise PydanticCustomError("scope", "should be an address without a scope (%...)")


def _network(value: str) -> str:
    _without_scope(value)
    try:
        return str(ipaddress.ip_network(value))
    except ValueError:
        raise PydanticCustomError("network", "should be an IP address or a network such as '10.0.0.0/24'") from None


def _matches(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise PydanticCustomError("pattern", what)
        return value

    return AfterValidator(check)


def _plain_path(value: str) -> str:
    if not PLAIN_PATH.fullmatch(value) or ".." in value.split("/"):
        raise PydanticCustomError("path", "should be an absolute path of letters, digits and . _ + - alone")
    return value


def _own_path(value: str) -> str:
    if not value.startswith("/") or not value.isprintable():
        raise PydanticCustomError("path", "should be an absolute path on the device")
    return value


def _backbone(value: str) -> str:
    if not value.isprintable() or value.startswith(("./", "../", "~")):
        raise PydanticCustomError("backbone", "should be an absolute path on the device, 'bundled' or a hub id")
    return value


def _not_taken(value: str) -> str:
    if value.lower() in TAKEN or value.endswith((".tar", ".pub")):
        raise PydanticCustomError("taken", "should not be 'server' or 'operator', nor end in .tar or .pub")
    return value


Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]
Days = Annotated[int, Field(ge=1, le=7300, strict=True)]
PlainPath = Annotated[str, AfterValidator(_plain_path)]
DeviceId = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    _matches(DEVICE, "should be up to 64 letters, digits, '.', '_' or '-'"),
    AfterValidator(_not_taken),
]


class _Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-"), allow_inf_nan=False
    )


class Server(_Table):
    """``[server]``.

    Attributes:
        hosts: Names and addresses of the server; devices use the first, the certificate is for all.
        port: Where devices reach it.
        superlink_port: Where the SuperLink listens, on loopback.
        operators: Addresses that reach the control API through the proxy; without any, only the server itself does.
        proxy: Whether nginx stands in front. Without it every device could submit runs: on loopback only.
    """

    hosts: Annotated[tuple[Host, ...], Field(min_length=1)]
    port: Port = 8443
    superlink_port: Port = 9091
    operators: tuple[Annotated[str, AfterValidator(_network)], ...] = ()
    proxy: bool = True

    @property
    def address(self) -> str:
        """``host:port`` as devices are told; IPv6 in brackets."""
        return joined(self.hosts[0], self.port if self.proxy else self.superlink_port)


def joined(host: str, port: int) -> str:
    """``host:port``, IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Certificates(_Table):
    """``[certificates]``: for how many days they are made."""

    ca_days: Days = 3650
    server_days: Annotated[int, Field(ge=1, le=825, strict=True)] = 397


class Paths(_Table):
    """``[paths]``: where things lie on the server and on every device."""

    config: PlainPath = "/etc/fedgen"
    state: PlainPath = "/var/lib/fedgen"
    environment: PlainPath = "/opt/fedgen"


class Device(_Table):
    """One ``[[device]]``.

    Attributes:
        host: By which the operator reaches the device; for what is printed, nothing else.
        memory: Bytes that training may take.
        backbone_bits: Of each weight of the backbone's linear layers on this device, 4 or 8; 0: as the run says.
        threads: Of the CPU, for training; 0: as the run says.
        prompts: A file on the device with what it is to generate; "": as its data folder says.
        cluster_key: A file on the device with the secret of all devices, where provisioning does not hand one out.
        cluster_noise: Least standard deviation of the noise on what is sent of the prompts.
        cluster_encoder: Where the encoder lies on the device that the run names; "": as the run says.
        port: Of the SuperNode on the device's own loopback.
        warm: Whether a worker stays in memory between messages.
    """

    id: DeviceId
    data: Annotated[str, AfterValidator(_own_path)]
    backbone: Annotated[str, AfterValidator(_backbone)] = ""
    rank: Annotated[int, Field(ge=0, le=1024, strict=True)] = 0
    memory: Annotated[int, BeforeValidator(bytes_of), Field(ge=0, strict=True)] = 0
    backbone_bits: Annotated[int, Field(strict=True), AfterValidator(known_bits)] = 0
    threads: Annotated[int, Field(ge=0, strict=True)] = 0
    prompts: Annotated[str, AfterValidator(lambda value: value and _own_path(value))] = ""
    cluster_key: Annotated[str, AfterValidator(lambda value: value and _own_path(value))] = ""
    cluster_noise: Annotated[float, Field(ge=0, strict=True)] = 0.0
    cluster_encoder: Annotated[str, AfterValidator(_backbone)] = ""
    host: Annotated[str, AfterValidator(lambda value: value and _host(value))] = ""
    port: Port = 9094
    warm: Annotated[bool, Field(strict=True)] = True

    def paths(self) -> dict[str, str]:
        """What lies on the device and is read there, by key; without the key of the clusters, which comes later."""
        named = {
            "data": self.data,
            "backbone": self.backbone,
            "prompts": self.prompts,
            "cluster-encoder": self.cluster_encoder,
        }
        return {key: path for key, path in named.items() if path.startswith("/")}


class Fleet(_Table):
    """A whole fleet file.

    Attributes:
        cluster_key: Whether provisioning makes a secret for all devices, but those that name a file of their own.
    """

    name: Annotated[str, _matches(NAME, "should be up to 32 letters, digits, '_' or '-'")] = "fleet"
    server: Server
    certificates: Certificates = Certificates()
    paths: Paths = Paths()
    cluster_key: Annotated[bool, Field(strict=True)] = False
    device: Annotated[tuple[Device, ...], Field(min_length=1)]


def read(file: Path) -> Fleet:
    """A fleet file.

    Raises:
        SettingsError: names every mistake with its key and value.
    """
    tree = read_toml(file)
    try:
        fleet = Fleet.model_validate(tree)
    except ValidationError as error:
        mistakes = [_explain(e["loc"], e["input"], e["msg"], e["type"]) for e in error.errors()]
        raise SettingsError("\n".join(f"{file}: {mistake}" for mistake in mistakes)) from None
    if found := list(_contradictions(fleet)):
        raise SettingsError("\n".join(f"{file}: {mistake}" for mistake in found))
    return fleet


def _explain(location: tuple[int | str, ...], value: Any, message: str, kind: str) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if kind == "missing":
        return f"{key} is missing"
    if kind == "extra_forbidden":
        return f"{key} = {value!r}: no such key"
    return f"{key} = {value!r}: {message.replace('Input should', 'should')}"


def _contradictions(fleet: Fleet) -> Iterator[str]:
    seen: dict[str, str] = {}
    places: dict[tuple[str, int], str] = {}
    for number, device in enumerate(fleet.device):
        if other := seen.get(device.id.lower()):
            yield f"device[{number}].id = {device.id!r}: so is another device called ({other!r}); case does not count"
        seen[device.id.lower()] = device.id
        place = (device.host, device.port)
        if device.host and place in places:
            yield f"device[{number}].port = {device.port!r}: {places[place]!r} on {device.host} has it too"
        places[place] = device.id
        for key, path in {**device.paths(), "cluster-key": device.cluster_key}.items():
            if hidden := _hidden(path, fleet.paths, device.id):
                yield (
                    f"device[{number}].{key} = {path!r}: lies in {hidden}, of which the services see their own folder "
                    f"alone ({hidden}/{device.id}); put it elsewhere"
                )
    if hidden := _hidden(fleet.paths.environment, fleet.paths, ""):
        yield f"paths.environment = {fleet.paths.environment!r}: lies in {hidden}, which the services do not see whole"
    if not fleet.server.proxy and (beyond := [host for host in fleet.server.hosts if not is_loopback(host)]):
        yield (
            f"server.proxy = False: without it the control API, which knows no login, would be open on {beyond[0]}; "
            "only for hosts = ['127.0.0.1'] and the like"
        )
    if fleet.server.proxy and fleet.server.port == fleet.server.superlink_port:
        yield f"server.port = {fleet.server.port!r}: the SuperLink itself listens there (superlink-port)"


def _hidden(path: str, paths: Paths, device: str) -> str:
    """The one of the fleet's two folders that a path lies in and that hides it from the device's services; "": none."""
    for folder in (paths.config, paths.state):
        own = Path(folder) / device if device else None
        if Path(path).is_relative_to(folder) and not (own and Path(path).is_relative_to(own)):
            return folder
    return ""


def is_loopback(host: str) -> bool:
    """Whether a host can only be this machine."""
    return ipaddress.ip_address(host).is_loopback if is_address(host) else host == "localhost"
