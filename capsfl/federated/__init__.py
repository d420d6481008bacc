"""Federated rounds over hospitals simulated as vmapped, masked shards."""

from capsfl.federated.devices import DevicesConfig as DevicesConfig
from capsfl.federated.federate import Federated as Federated
from capsfl.federated.federate import federate as federate
from capsfl.federated.federation import Federation as Federation
from capsfl.federated.federation import RoundReport as RoundReport
from capsfl.federated.federation import RoundsConfig as RoundsConfig
from capsfl.federated.hospitals import Hospitals as Hospitals
from capsfl.federated.hospitals import stack_hospitals as stack_hospitals
from capsfl.federated.local import LocalConfig as LocalConfig
from capsfl.federated.server import ServerConfig as ServerConfig
from capsfl.federated.store_writer import write_hospitals_store as write_hospitals_store
from capsfl.federated.stored import StoredHospitals as StoredHospitals
from capsfl.federated.stored import open_hospitals_store as open_hospitals_store
