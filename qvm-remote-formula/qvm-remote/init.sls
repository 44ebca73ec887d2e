# Everything that dom0 needs: qubesctl state.apply qvm-remote
include:
  - qvm-remote.dom0
  - qvm-remote.client
  - qvm-remote.vm
