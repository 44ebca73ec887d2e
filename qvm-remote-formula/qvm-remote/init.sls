# Everything: qubesctl state.apply qvm-remote
include:
  - qvm-remote.pillar
  - qvm-remote.client
  - qvm-remote.vm
  - qvm-remote.dom0
