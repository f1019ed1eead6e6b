set -eu
export PATH="@{environment}/bin:/usr/local/bin:/usr/bin:/bin"
export HOME="@{home}"
export FLWR_HOME="@{home}/flower"
export FEDGEN_CACHE="@{home}/cache"
export HF_HOME="@{home}/hub"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONNOUSERSITE=1  # what an app leaves in this home is no code of who starts next
umask 077
cd "@{home}"
