# shellcheck shell=bash
# Containers: what srun is given so that a command runs in one. BDPO_CONTAINER_RUNTIME says by what.

# Fills SRUN_CONTAINER (options of srun) and INSIDE (words before the command), which on_all_nodes uses.
# shellcheck disable=SC2034
container() {
  SRUN_CONTAINER=() INSIDE=()
  [ -n "$BDPO_CONTAINER" ] || return 0
  local program image mounts="$BDPO_HOME:$BDPO_HOME,$RUN_DIR:$RUN_DIR${BDPO_CONTAINER_MOUNTS:+,$BDPO_CONTAINER_MOUNTS}"
  case $BDPO_CONTAINER_RUNTIME in
    pyxis)
      srun --help 2>&1 | grep -q -e --container-image || die "BDPO_CONTAINER is set, but this srun has no --container-image:" \
        "pyxis is not installed. With Apptainer: BDPO_CONTAINER_RUNTIME=apptainer; without a container: unset BDPO_CONTAINER."
      image=$(imported enroot sqsh "$BDPO_CONTAINER" import --output) || exit 2
      SRUN_CONTAINER=(--container-image="$image" --no-container-mount-home --container-mounts="$mounts")
      ;;
    apptainer)
      program=$(command -v apptainer || command -v singularity) || die "BDPO_CONTAINER_RUNTIME=apptainer, but there is no" \
        "apptainer on $(uname -n). With pyxis: BDPO_CONTAINER_RUNTIME=pyxis; without a container: unset BDPO_CONTAINER."
      image=$(imported "$program" sif "${BDPO_CONTAINER/\#//}" pull) || exit 2
      INSIDE=("$program" exec --bind "$mounts")
      [ "$BDPO_DEVICE" != gpu ] || INSIDE+=(--nv)
      INSIDE+=("$image")
      ;;
    *) die "BDPO_CONTAINER_RUNTIME=$BDPO_CONTAINER_RUNTIME is not known. It is pyxis or apptainer." ;;
  esac
}

# imported PROGRAM SUFFIX IMAGE COMMAND...: the file of an image. One of a registry is fetched once for all nodes and jobs,
# into BDPO_CONTAINER_CACHE; without this each node would, at every step. A file is itself.
imported() {
  local program=$1 suffix=$2 image=$3 file; shift 3
  if [[ $image = /* || $image = *.sqsh || $image = *.sif ]]; then
    [ -r "$image" ] || die "BDPO_CONTAINER=$image cannot be read."
    echo "$image"
    return
  fi
  if ! command -v "$program" > /dev/null; then   # pyxis imports it by itself, on each node
    echo "$image"
    return
  fi
  file=$BDPO_CONTAINER_CACHE/$(tr -c 'A-Za-z0-9._\n-' _ <<< "${image#docker://}").$suffix
  mkdir -p "$BDPO_CONTAINER_CACHE" || die "BDPO_CONTAINER_CACHE=$BDPO_CONTAINER_CACHE cannot be written."
  (
    [ -e "$file" ] || flock --timeout 7200 9 || die "$file is being imported by another job for two hours."
    if [ ! -e "$file" ]; then
      say "importing $image into $file" >&2
      rm -f "$file.new.$suffix"
      "$program" "$@" "$file.new.$suffix" "docker://${image#docker://}" >&2 && mv "$file.new.$suffix" "$file"
    fi
  ) 9> "$file.lock"
  [ -e "$file" ] || die "BDPO_CONTAINER=$image could not be imported by $program."
  echo "$file"
}
